"""Block expansion: add decoder layers to a model without changing what it computes.

Each new layer is a copy of the one before it whose two projections into the residual stream are zero, so that it adds
exactly nothing until it is trained. The layers are cut into as many groups as there are new ones, as even as they can
be, and each group is followed by one. Trained alone, with the original layers frozen, the new ones take up new
knowledge and the old is kept.

The checkpoint is rewritten tensor by tensor. `expansion.json` in the output says which layers are new.

Source: LLaMA Pro, arXiv 2401.02415, section 3.2.
Left out: architectures whose decoder layer writes to the residual stream in other ways than one attention and one MLP
projection; they are refused by name.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import tqdm

from hf_fsdp_qlora.base_checkpoint import BaseCheckpoint, open_base_checkpoint
from hf_fsdp_qlora.checkpoint_writer import MAX_SHARD_BYTES, CheckpointWriter, new_folder
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.safetensors_stream import SafetensorsReader
from hf_fsdp_qlora.skeleton import decoder_layers

logger = logging.getLogger(__name__)

RECORD_NAME = "expansion.json"
RESIDUAL_PROJECTIONS = (
    ("self_attn.o_proj", "mlp.down_proj"),  # Llama and most that came after it
    ("attention.dense", "mlp.dense_4h_to_h"),  # GPT-NeoX
)


@dataclass(frozen=True)
class Expansion:
    """What was added. Layers are counted from 0 in the expanded model.

    Attributes:
        base_model: what was expanded.
        num_layers: decoder layers of the expanded model.
        layers: module path of the list of layers ("model.layers").
        new_layers: the added layers, ascending.
        copied_from: for each of them, the layer of the base model that it is a copy of.
        modules: what a layer consists of: its modules with weights of their own ("mlp.up_proj", "input_layernorm").
        zeroed: those of them that are zero in the new layers.
    """

    base_model: str
    num_layers: int
    layers: str
    new_layers: tuple[int, ...]
    copied_from: tuple[int, ...]
    modules: tuple[str, ...]
    zeroed: tuple[str, ...]

    @property
    def new_modules(self) -> list[str]:
        """Paths of the modules with weights in the new layers.

        One by one, because upstream's patterns match the beginning of a name: "model.layers.1" means layer 10 too.
        """
        return [f"{self.layers}.{index}.{module}" for index in self.new_layers for module in self.modules]


def expand_checkpoint(
    model_name_or_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    new_layers: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Expansion:
    """Write a model with `new_layers` more decoder layers that computes the same.

    Args:
        model_name_or_path: hub id or folder.
        output: the folder to create. It must not exist or be empty.
        new_layers: from 1 to the number of layers the model has.
        max_shard_bytes: of tensors in one file.
        revision, token, trust_remote_code: as in `from_pretrained`.

    Returns:
        What was added, which is also written to `expansion.json` in the output.

    Raises:
        ConfigError: the output is not empty, `new_layers` is out of range, or the architecture cannot be expanded.
            Nothing is left behind.
    """
    target = Path(output)
    base = open_base_checkpoint(
        model_name_or_path, revision=revision, token=token, trust_remote_code=trust_remote_code
    )
    expansion = _plan(base, new_layers)
    changes = _config_changes(base.skeleton.config, expansion)
    with new_folder(target) as unfinished:
        with CheckpointWriter(unfinished, max_shard_bytes=max_shard_bytes) as writer:
            for name, tensor in _expanded(base, expansion):
                writer.add({name: tensor})
        (unfinished / RECORD_NAME).write_text(json.dumps(asdict(expansion), indent=2) + "\n")
        base.copy_side_files(unfinished, base.folder)
        base.write_config(unfinished, changes)
    logger.info("Added layers %s to %s: %s", list(expansion.new_layers), base.name, target)
    return expansion


def read_expansion(folder: str | os.PathLike[str]) -> Expansion:
    """The record of a folder that `expand_checkpoint` wrote.

    Raises:
        ConfigError: the folder has none.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise ConfigError(f"{folder} has no {RECORD_NAME}; `hf-fsdp-qlora expand` writes one.")
    values: dict[str, Any] = json.loads(path.read_text())
    lists: dict[str, Any] = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Expansion(**{**values, **lists})


def _plan(base: BaseCheckpoint, count: int) -> Expansion:
    layers, prefix = _layers(base.skeleton)
    before = len(layers)
    if not 1 <= count <= before:
        raise ConfigError(f"--new-layers {count} is not possible: {base.name} takes 1 to {before}, one per layer.")
    ends = [(group + 1) * before // count - 1 for group in range(count)]
    return Expansion(
        base_model=base.name, num_layers=before + count, layers=prefix,
        new_layers=tuple(end + 1 + group for group, end in enumerate(ends)), copied_from=tuple(ends),
        modules=tuple(
            name for name, module in layers[0].named_modules() if any(True for _ in module.parameters(recurse=False))
        ),
        zeroed=_residual_projections(layers[0]),
    )  # fmt: skip


def _layers(model: PreTrainedModel) -> tuple[list[nn.Module], str]:
    """The decoder layers and the path of the list that holds them."""
    layers = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    paths = [names[id(layer)] for layer in layers]
    prefix = paths[0].rpartition(".")[0]
    if paths != [f"{prefix}.{index}" for index in range(model.config.num_hidden_layers)]:
        raise ConfigError(
            f"{type(model).__name__} does not keep its {model.config.num_hidden_layers} decoder layers in one list "
            f"({', '.join(paths[:3])}, ...); it cannot be expanded."
        )
    return layers, prefix


def _residual_projections(layer: nn.Module) -> tuple[str, str]:
    """The two linear layers whose output is added to the residual stream."""
    linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    for pair in RESIDUAL_PROJECTIONS:
        blocks = tuple(name.rpartition(".")[0] + "." for name in pair)
        if linears.issuperset(pair) and all(name.startswith(blocks) for name in linears):
            return pair
    raise ConfigError(
        f"{type(layer).__name__} is no decoder layer of one attention and one MLP block with known output projections "
        f"({' or '.join(' and '.join(pair) for pair in RESIDUAL_PROJECTIONS)}), so it is not known which weights "
        f"must be zero for a new layer to change nothing. Its linear layers: {', '.join(sorted(linears)) or 'none'}."
    )


def _config_changes(config: PreTrainedConfig, expansion: Expansion) -> dict[str, Any]:
    """The number of layers, and every list with an entry per layer, new layers like those they are copies of.

    Such lists (`layer_types`) are written even where the original leaves them to be derived from the layer's number,
    because the numbers of the original layers change.
    """
    values = config.to_dict()
    before = config.num_hidden_layers
    count_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changes: dict[str, Any] = {count_key: expansion.num_layers}
    for key, value in values.items():
        if "layer" in key and isinstance(value, list) and len(value) == before:
            changes[key] = [value[source] for source, _ in _sources(expansion)]
    return changes


def _sources(expansion: Expansion) -> list[tuple[int, bool]]:
    """For every layer of the expanded model: the layer it comes from, and whether it is new."""
    sources = []
    for index in range(expansion.num_layers - len(expansion.new_layers)):
        sources.append((index, False))
        if index in expansion.copied_from:
            sources.append((index, True))
    return sources


def _expanded(base: BaseCheckpoint, expansion: Expansion) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the expanded model, in the order of the base's files."""
    targets: dict[int, list[int]] = {}
    for index, (source, _) in enumerate(_sources(expansion)):
        targets.setdefault(source, []).append(index)
    inside = re.compile(re.escape(expansion.layers) + r"\.(\d+)\.(.+)")
    with tqdm(total=len(base.infos), desc="Expanding", unit="tensors") as progress:
        for file, keys in base.files.items():
            with SafetensorsReader(base.folder / file) as reader:
                for key in keys:
                    tensor = reader.read(key)
                    progress.update()
                    place = inside.fullmatch(base.parameter_names[key])
                    if place is None:
                        yield key, tensor
                        continue
                    for target in targets[int(place[1])]:
                        is_zero = target in expansion.new_layers and place[2].rpartition(".")[0] in expansion.zeroed
                        yield _renumbered(key, place, target), torch.zeros_like(tensor) if is_zero else tensor


def _renumbered(key: str, place: re.Match[str], target: int) -> str:
    """The checkpoint's own name for a tensor, in another layer."""
    ending = f".{place[1]}.{place[2]}"
    if not key.endswith(ending):
        raise ConfigError(
            f"The checkpoint's tensor {key} is {place[0]} in the model, and its layer cannot be renumbered. Save the "
            "model once with transformers' save_pretrained and expand that."
        )
    return f"{key.removesuffix(ending)}.{target}.{place[2]}"
