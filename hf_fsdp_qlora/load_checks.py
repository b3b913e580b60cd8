"""The rules of `validate`, applied by `load_model` to what it can see: its arguments and the launcher's environment.

What only the trainer's settings can break is checked by `validate`, which `hf-fsdp-qlora train` and recipes/sft.py
call before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from hf_fsdp_qlora.engine import Engine, Offload, check_offload_backend, launched_config, mixed_precision
from hf_fsdp_qlora.precision import Precision, check_precision
from hf_fsdp_qlora.validation import ModelFacts, Run, apply_rules, raise_for
from hf_fsdp_qlora.validation_launch_rules import LAUNCH_RULES
from hf_fsdp_qlora.validation_model_rules import wrapped_classes_exist


def check_settings(
    quantization_config: Any,
    *,
    engine: Engine,
    device: torch.device,
    numbers: Precision,
    offload: Offload,
    offload_pin_memory: bool,
    replicate_head: bool,
    embedding_on_host: bool,
    rotary: bool,
    peft_config: PeftConfig | None,
    model_kwargs: Mapping[str, Any],
) -> None:
    """Apply the rules that need no model.

    Raises:
        ConfigError: all problems in one message, each with field, value, reason and fix.
    """
    recipe = {
        "dtype": _name(numbers.dtype), "adapter_dtype": _name(numbers.adapter_dtype),
        "offload": offload, "offload_pin_memory": offload_pin_memory, "replicate_head": replicate_head,
        "embedding_on_host": embedding_on_host, "rotary_active": rotary or None,
        "model_init_kwargs": dict(model_kwargs),
        "lora_target_parameters": getattr(peft_config, "target_parameters", None),
        **({"precision": numbers.name} if numbers.is_preset else {}),
        **_four_bit_keys(quantization_config),
    }  # fmt: skip
    raise_for(apply_rules(LAUNCH_RULES, Run(launched_config(engine, device), recipe)))
    check_offload_backend(offload, engine, device)
    check_precision(numbers, quantization_config, mixed_precision=mixed_precision(), engine=engine)


def check_wrapped_classes(model: PreTrainedModel, name: str, *, engine: Engine, device: torch.device) -> None:
    """Apply the rule that accelerate's wrap policy names a class of the model.

    Args:
        model: on meta, as transformers built it.

    Raises:
        ConfigError: it names none; accelerate would say so once everything is loaded.
    """
    facts = ModelFacts(name, frozenset(type(module).__name__ for module in model.modules()), None, None)
    raise_for(apply_rules([wrapped_classes_exist], Run(launched_config(engine, device), {}, facts)))


def _four_bit_keys(config: Any) -> dict[str, Any]:
    storage = getattr(config, "bnb_4bit_quant_storage", None)
    return {
        "load_in_4bit": bool(getattr(config, "load_in_4bit", False)),
        "load_in_8bit": bool(getattr(config, "load_in_8bit", False)),
        **({} if storage is None else {"bnb_4bit_quant_storage": _name(storage)}),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
