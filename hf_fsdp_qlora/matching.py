"""Which tensor of a checkpoint is which parameter of the model.

Names follow transformers' own conversion mapping, so what it renames while it loads is found here too. What it would
merge or split is refused: a stream cannot.
"""

from __future__ import annotations

import re

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_fsdp_qlora.checkpoint import StoredTensor
from hf_fsdp_qlora.errors import ConfigError

OLD_ROTARY_KEYS = r"rotary_emb\.inv_freq"
"""Checkpoints from before transformers 4.32 hold these; they are computed from the config now."""


def match_checkpoint(
    model: PreTrainedModel, wanted: dict[str, Tensor], tensors: dict[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Find the model's name for every tensor of the checkpoint, renaming as transformers does.

    Args:
        model: for its conversion mapping and prefix.
        wanted: `model.state_dict(keep_vars=True)` as transformers built it, before any layer was replaced.
        tensors: the checkpoint.

    Returns:
        The stored tensor of every parameter and persistent buffer (one name of each group of tied ones), and the
        sorted names of tensors that the model has no use for.

    Raises:
        ConfigError: a weight is missing, has another shape, or would have to be merged or split while loading.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: dict[str, StoredTensor] = {}
    unused: list[str] = []
    for source, stored in tensors.items():
        name, converter = rename_source_key(source, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and source in wanted:
            name = source
        elif converter is not None:
            raise ConfigError(
                f"{source} is merged or split while loading ({converter} in transformers' conversion mapping), which "
                "cannot be streamed. Save the model once with transformers' save_pretrained(save_original_format="
                "False) if that stores plain tensors; mixture-of-experts models are not supported."
            )
        if name in wanted:
            found[name] = stored
        else:
            unused.append(source)
    wrong = [f"{n}: {found[n].shape} in the checkpoint, {tuple(wanted[n].shape)} in the model" for n in found
             if found[n].shape != tuple(wanted[n].shape)]  # fmt: skip
    if wrong:
        raise ConfigError("The checkpoint does not fit its config: " + "; ".join(wrong))
    return _one_name_each(wanted, found), sorted(_drop_expected(model, unused))


def _one_name_each(wanted: dict[str, Tensor], found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Keep one name of each tied group and make sure that every group has one."""
    groups: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        groups.setdefault(id(tensor), []).append(name)
    chosen: dict[str, StoredTensor] = {}
    missing: list[str] = []
    for names in groups.values():
        present = [name for name in names if name in found]
        if present:
            chosen[present[0]] = found[present[0]]
        else:
            missing.extend(names)
    if missing:
        raise ConfigError(
            f"The checkpoint lacks {len(missing)} weights of the model: {', '.join(sorted(missing)[:8])}"
            f"{', ...' if len(missing) > 8 else ''}. It is not a whole checkpoint of this architecture."
        )
    return chosen


def _drop_expected(model: PreTrainedModel, unused: list[str]) -> list[str]:
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), OLD_ROTARY_KEYS]
    return [name for name in unused if not any(re.search(pattern, name) for pattern in patterns)]
