"""Which LoRA configurations this package honours, decided on the meta model before any weight is read.

PEFT has many options, and some need what nobody holds here: the full weight of a layer, or a weight that may be
rewritten. Each of those is refused by name, all of them in one message. The rest is PEFT's own: which modules a
config targets is asked from PEFT and never worked out again.

Left out on purpose: what PEFT itself refuses with a clear message while it injects (that happens on meta too).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType, TaskType
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.linear import QuantizedLinear

# The values of init_lora_weights that need no full weight.
SUPPORTED_INITS = (True, False, "gaussian", "orthogonal")

# How the others begin, and how to train them all the same: stock PEFT makes the start once, on a model in 16 bit.
_CHANGES_BASE = (
    "it moves a part of the full weight into the adapter, so the base would have to be decomposed before it is "
    "quantised. Make it once with stock PEFT in 16 bit: get_peft_model, then peft_config['default'].init_lora_weights "
    "= True, save_pretrained for the adapter, unload().save_pretrained for the base; load that base here, with that "
    "adapter as adapter_name_or_path"
)
_NEEDS_MODEL = (
    "it needs the full weight or training data at initialisation. Make the adapter once with stock PEFT ({how}), save "
    "it with init_lora_weights = True in its config, and continue from it with adapter_name_or_path"
)
_REFUSED_INITS = {
    "pissa": _CHANGES_BASE,
    "olora": _CHANGES_BASE,
    "corda": _CHANGES_BASE,
    "lora_ga": _CHANGES_BASE,
    "loftq": _NEEDS_MODEL.format(how="replace_lora_weights_loftq, which leaves the quantised base as it is"),
    "eva": _NEEDS_MODEL.format(how="initialize_lora_eva_weights"),
}

# Variants of LoRA that work over rows.
SUPPORTED_VARIANTS = ("use_dora",)

# Fields that must stay unset, with the reason and what to do instead.
_REFUSED_FIELDS = {
    "trainable_token_indices": "PEFT cannot build these tensors on the meta device, so they would never be filled. "
    'Train whole embeddings with modules_to_save=["embed_tokens", "lm_head"]',
    "target_parameters": "bare parameters (fused experts) are not quantized and have no LoRA layer here. Name linear "
    "layers in target_modules",
    "layer_replication": "the copies have no weights in the checkpoint to stream. Save an expanded checkpoint and "
    "load that",
    "megatron_config": "Megatron layers are not loaded by this package. Leave megatron_config unset",
    "use_qalora": "QA-LoRA works on GPTQ layers only. Set use_qalora=False",
    "fan_in_fan_out": "it is for Conv1D layers, which this package does not load. Set fan_in_fan_out=False",
}

# What two configs must agree on to describe the same tensors and the same function of them.
_SHAPE_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias")


def check_peft_config(peft_config: PeftConfig, model: PreTrainedModel, *, trained: bool = False) -> None:
    """Refuse a config that cannot be honoured, naming every problem at once.

    Args:
        peft_config: what the user passed, or what a saved adapter says.
        model: the model on meta, with its quantized layers already in place and no adapter.
        trained: the config belongs to a saved adapter, whose values will be read and not initialised; target names
            that match nothing are then as harmless as they were when it was saved.

    Raises:
        ConfigError: one line per problem: what was got and what to do instead.
    """
    if not isinstance(peft_config, LoraConfig) or peft_config.peft_type != PeftType.LORA:
        raise ConfigError(
            f"peft_config is a {type(peft_config).__name__}, and only plain LoRA is supported. Pass a peft.LoraConfig."
        )
    problems = [*_field_problems(peft_config), *_target_problems(peft_config, model)]
    problems += _trained_init_problems(peft_config) if trained else _init_problems(peft_config)
    problems += _modules_to_save_problems(peft_config, model)
    if not trained:
        problems += _unmatched_name_problems(peft_config, model)
    if problems:
        listed = "\n".join(f"- {problem}." for problem in problems)
        raise ConfigError(f"peft_config cannot be honoured:\n{listed}")


def targeted_modules(peft_config: LoraConfig, model: PreTrainedModel) -> list[str]:
    """Names of the modules that get a LoRA layer, in the order PEFT visits them.

    Args:
        peft_config: any LoraConfig; it is not changed.
        model: a model without adapters.
    """
    config: Any = copy.deepcopy(peft_config)
    if config.target_modules is None:
        default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        if default is None:
            return []
        config.target_modules = default if isinstance(default, str) else set(default)
    # Private in PEFT, but the only place that knows what "all-linear" leaves out.
    config = _maybe_include_all_linear_layers(config, model)
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]


def read_adapter_config(
    adapter_name_or_path: str,
    model: PreTrainedModel,
    *,
    peft_config: PeftConfig | None = None,
    is_trainable: bool = True,
    **hub_kwargs: Any,
) -> LoraConfig:
    """The config of a saved adapter, checked against the model and against the user's own config if there is one.

    Args:
        adapter_name_or_path: hub id or local folder with adapter_config.json.
        model: the model on meta, without adapters.
        peft_config: must describe the same tensors. Its lora_dropout wins, because that is a setting of this run; what
            concerns initialisation only is ignored.
        is_trainable: False freezes the adapter, for evaluation.
        hub_kwargs: revision, token, cache_dir, subfolder.

    Raises:
        ConfigError: there is no adapter at that place, it cannot be honoured, or the two configs disagree.
    """
    try:
        config: Any = PeftConfig.from_pretrained(adapter_name_or_path, **hub_kwargs)
    except ValueError as error:
        raise ConfigError(
            f"adapter_name_or_path={adapter_name_or_path!r} is no saved PEFT adapter: {error}. Pass a hub id or a "
            "folder with adapter_config.json and adapter_model.safetensors."
        ) from error
    check_peft_config(config, model, trained=True)
    if peft_config is not None:
        check_peft_config(peft_config, model, trained=True)
        assert isinstance(peft_config, LoraConfig)  # checked above
        differences = _differences(config, peft_config, model)
        if differences:
            raise ConfigError(
                f"peft_config and the adapter in {adapter_name_or_path!r} disagree on {'; '.join(differences)}. "
                "Leave peft_config out to continue with the adapter's own config."
            )
        config.lora_dropout = peft_config.lora_dropout
    config.inference_mode = not is_trainable
    return config


def _field_problems(config: LoraConfig) -> Iterable[str]:
    for name, reason in _REFUSED_FIELDS.items():
        value = getattr(config, name)
        if value:
            yield f"{name}={value!r}: {reason}"
    for field in dataclasses.fields(config):
        known = field.name in _REFUSED_FIELDS or field.name in SUPPORTED_VARIANTS
        if field.metadata.get("is_lora_variant") and not known and getattr(config, field.name):
            yield f"{field.name}: this LoRA variant is not supported over quantized layers. Leave it unset"
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        yield f"task_type={config.task_type!r}: only causal language models are loaded. Use task_type='CAUSAL_LM'"


def _init_problems(config: LoraConfig) -> Iterable[str]:
    init = config.init_lora_weights.lower() if isinstance(config.init_lora_weights, str) else config.init_lora_weights
    if init not in SUPPORTED_INITS:
        known = [reason for name, reason in _REFUSED_INITS.items() if str(init).startswith(name)]
        why = known[0] if known else "this initialisation is not known here"
        yield (
            f"init_lora_weights={config.init_lora_weights!r}: {why}. Or use one of "
            f"{', '.join(map(repr, SUPPORTED_INITS))}"
        )
    odd = sorted({rank for rank in (config.r, *(config.rank_pattern or {}).values()) if rank % 2})
    if init == "orthogonal" and odd:
        yield f"init_lora_weights='orthogonal' needs even ranks, got {odd}. Change r or rank_pattern"


def _trained_init_problems(config: LoraConfig) -> Iterable[str]:
    init = str(config.init_lora_weights).lower()
    if init.startswith(("pissa", "corda", "olora", "loftq", "lora_ga")):
        yield (
            f"the adapter was trained with init_lora_weights={config.init_lora_weights!r}, which changes the base "
            "weights. Save it again with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    elif init == "mica":
        yield "init_lora_weights='mica': this LoRA variant is not supported. Use an adapter trained as plain LoRA"


def _target_problems(config: LoraConfig, model: PreTrainedModel) -> Iterable[str]:
    names = targeted_modules(config, model)
    modules = dict(model.named_modules())
    if config.target_modules == DUMMY_TARGET_MODULES and config.modules_to_save:
        return  # PEFT's own word for no LoRA at all: only modules_to_save are trained
    if not names:
        yield (
            f"target_modules={_shown(config.target_modules)} (with exclude_modules, modules_to_save and "
            "layers_to_transform) leaves no module to adapt. The model's linear layers are "
            f"{_shown(_linear_names(model))}; 'all-linear' takes all of them"
        )
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = [name for name in names if any(modules[name] is end for end in ends)]
    if embeddings:
        yield (
            f"target_modules matches {_shown(embeddings)}: LoRA on the embeddings or the head is not supported (the "
            "trainer's fused head would skip it, and PEFT would save the whole frozen weight with the adapter). Use "
            f"modules_to_save={[name.rpartition('.')[2] for name in embeddings]!r}"
        )
    others = sorted({type(modules[name]).__name__ for name in names if not isinstance(modules[name], nn.Linear)})
    if others and not embeddings:
        yield (
            f"target_modules matches modules that are no linear layers ({', '.join(others)}). Make it match only "
            f"{_shown(_linear_names(model))}"
        )


def _unmatched_name_problems(config: LoraConfig, model: PreTrainedModel) -> Iterable[str]:
    names = [name for name, _ in model.named_modules() if name]
    if not isinstance(config.target_modules, str):
        for target in sorted(config.target_modules or ()):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                yield f"target_modules: {target!r} matches nothing. {_closest(target, names, model)}"
    targets = targeted_modules(config, model)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or ():
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
                yield f"{field}: {pattern!r} matches no targeted module. {_closest(pattern, targets, model)}"
    for saved in config.modules_to_save or ():
        if not any(name.endswith(saved) for name in names):
            yield f"modules_to_save: {saved!r} matches nothing. {_closest(saved, names, model)}"


def _modules_to_save_problems(config: LoraConfig, model: PreTrainedModel) -> Iterable[str]:
    modules = dict(model.named_modules())
    quantized = [name for name, module in modules.items() if isinstance(module, QuantizedLinear)]
    for saved in config.modules_to_save or ():
        roots = [name for name in modules if name and name.endswith(saved)]
        inside = [name for name in quantized if any(name == root or name.startswith(f"{root}.") for root in roots)]
        if inside:
            yield (
                f"modules_to_save: {saved!r} would train quantized layers ({_shown(inside)}). Add it to "
                "llm_int8_skip_modules to keep it in 16 bit, or target it with LoRA"
            )
        biased = [root for root in roots if any(n.endswith("bias") for n, _ in modules[root].named_parameters())]
        if config.bias == "all" and biased:
            yield (
                f"bias='all' with modules_to_save: {saved!r}, which has biases: PEFT would save frozen ones beside "
                "the trained ones. Use bias='lora_only'"
            )


def _differences(saved: LoraConfig, given: LoraConfig, model: PreTrainedModel) -> list[str]:
    differences = [
        f"{field} ({getattr(given, field)!r} against {getattr(saved, field)!r})"
        for field in _SHAPE_FIELDS
        if getattr(given, field) != getattr(saved, field)
    ]
    only_given = set(targeted_modules(given, model)) - set(targeted_modules(saved, model))
    only_saved = set(targeted_modules(saved, model)) - set(targeted_modules(given, model))
    if only_given or only_saved:
        differences.append(
            f"target_modules (only in peft_config: {_shown(sorted(only_given))}, only in the adapter: "
            f"{_shown(sorted(only_saved))})"
        )
    if set(given.modules_to_save or ()) != set(saved.modules_to_save or ()):
        differences.append(f"modules_to_save ({given.modules_to_save!r} against {saved.modules_to_save!r})")
    return differences


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Last name parts of the linear layers but the head, each once, in the model's order."""
    head = model.get_output_embeddings()
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(name.rpartition(".")[2] for name, module in linears if module is not head))


def _closest(wanted: str, names: Iterable[str], model: PreTrainedModel) -> str:
    """A sentence that names the nearest existing module names."""
    choices = list(dict.fromkeys(name if "." in wanted else name.rpartition(".")[2] for name in names))
    near = difflib.get_close_matches(wanted, choices, n=3) or _linear_names(model)
    return f"Did you mean {_shown(near)}?"


def _shown(names: Any) -> str:
    """Names for a message: the first few, and how many more."""
    if names is None or isinstance(names, str):
        return repr(names)
    listed = sorted(names) if isinstance(names, (set, frozenset)) else list(names)
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more if listed else "none"
