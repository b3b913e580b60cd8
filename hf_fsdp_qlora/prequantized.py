"""Checkpoints that are in bitsandbytes 4 bits already: their config, and the layers that hold their weights.

Nothing is quantised again, so the result is what stock transformers would compute with, byte for byte. The format
comes from the folder and cannot be chosen; what is quantised is what the folder holds in 4 bits, whatever its config
says. Weights dequantise straight to `load_model`'s `dtype`, as the forward of bitsandbytes 0.50 does; the dtype in
their quant states, which `bitsandbytes.functional.dequantize_4bit` would return, is that of the model before it was
quantised.

Left out: every other quantised format (LLM.int8, GPTQ, AWQ, FP8, ...), refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from hf_fsdp_qlora.checkpoint import StoredTensor
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.quantization import BlockwiseFourBitConfig
from hf_fsdp_qlora.quantization.stored import PackedWeight, find_packed_weights
from hf_fsdp_qlora.skeleton import quantizable_linears, replace_named_linears

_FORMAT_FIELDS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def take_stored_config(config: PretrainedConfig) -> BitsAndBytesConfig | None:
    """Remove the quantisation config from a model's config and return it; None if the checkpoint is not quantised.

    Raises:
        ConfigError: the checkpoint is in a format that cannot become rows.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    del config.quantization_config
    values = stored if isinstance(stored, dict) else stored.to_dict()
    method = values.get("quant_method")
    if method == "bitsandbytes" and values.get("load_in_4bit"):
        return BitsAndBytesConfig.from_dict(values)
    name = "bitsandbytes LLM.int8" if method == "bitsandbytes" else getattr(method, "value", method)
    raise ConfigError(
        f"The checkpoint is quantised already, with {name}; only bitsandbytes 4-bit checkpoints can be read as they "
        "are. Load the original model that it was made from."
    )


def runtime_config(stored: BitsAndBytesConfig, wanted: Any) -> BitsAndBytesConfig:
    """The config to load a quantised checkpoint with: its own, with the caller's runtime settings if there are any.

    Args:
        stored: the checkpoint's.
        wanted: `load_model`'s `quantization_config`, or None. `bnb_4bit_compute_dtype` and `bnb_4bit_quant_storage`
            may differ from the checkpoint's, because neither changes what it holds.

    Raises:
        ConfigError: `wanted` asks for another format.
    """
    if wanted is None:
        config = copy.copy(stored)
        config.bnb_4bit_quant_storage = torch.uint8  # "choose": the dtype in the file says nothing about this engine
        config.bnb_4bit_compute_dtype = torch.float32  # its default, which means `dtype` here
        config.llm_int8_skip_modules = None
        return config
    if not isinstance(wanted, BitsAndBytesConfig) or not wanted.load_in_4bit:
        raise ConfigError(
            f"The checkpoint is in bitsandbytes 4 bits already, but quantization_config asks for "
            f"{type(wanted).__name__} ({_method(wanted)}). Pass no quantization_config, or load the original model."
        )
    pairs = {field: (getattr(wanted, field), getattr(stored, field)) for field in _FORMAT_FIELDS}
    differing = [f"{field} ({ours!r}, it has {theirs!r})" for field, (ours, theirs) in pairs.items() if ours != theirs]
    if differing:
        raise ConfigError(
            f"The checkpoint is quantised already, and quantization_config differs from it in {', '.join(differing)}. "
            "Pass no quantization_config, or load the original model."
        )
    return wanted


def pack_checkpoint(
    tensors: Mapping[str, StoredTensor], config: BitsAndBytesConfig, dtype: torch.dtype
) -> dict[str, StoredTensor]:
    """The checkpoint with one `PackedWeight` in the place of the tensors of each quantised weight.

    Args:
        config: of `runtime_config`.
        dtype: of `load_model`: what weights dequantise to, and the compute dtype unless the config names one.

    Raises:
        ConfigError: weights that cannot be read, or a `bnb_4bit_blocksize` other than the checkpoint's.
    """
    wanted = config.bnb_4bit_compute_dtype
    packed, others = find_packed_weights(
        tensors, dtype=dtype, compute_dtype=dtype if wanted in (None, torch.float32) else wanted
    )
    if not packed:
        raise ConfigError("The config says that the checkpoint is in bitsandbytes 4 bits, but none of its weights is.")
    if isinstance(config, BlockwiseFourBitConfig):
        sizes = {weight.backend.block_size for weight in packed.values()}
        if sizes != {config.bnb_4bit_blocksize}:
            raise ConfigError(
                f"The checkpoint is quantised already, and quantization_config differs from it in bnb_4bit_blocksize "
                f"({config.bnb_4bit_blocksize}, it has {sorted(sizes)}). Pass no quantization_config."
            )
    return {**others, **packed}


def replace_packed_linears(
    model: PreTrainedModel,
    matched: Mapping[str, StoredTensor],
    config: BitsAndBytesConfig,
    *,
    storage_dtype: torch.dtype,
) -> list[str]:
    """Put a `QuantizedLinear` in the place of every linear layer whose weight the checkpoint holds in 4 bits.

    Args:
        matched: the stored tensor of every parameter, by the model's names.
        config: of `runtime_config`.

    Returns:
        Names of the linear layers that stay as they were, for the report.

    Raises:
        ConfigError: something else than a linear layer of the body is packed, or the config's
            `llm_int8_skip_modules` asks for other layers than the checkpoint's.
    """
    backends = {
        name.removesuffix(".weight"): stored.backend
        for name, stored in matched.items()
        if isinstance(stored, PackedWeight)
    }
    head = model.get_output_embeddings()
    for name in backends:
        module = model.get_submodule(name)
        if type(module) is not nn.Linear or module is head:
            raise ConfigError(
                f"The checkpoint holds {name} ({type(module).__name__}) in 4 bits; only linear layers other than the "
                "head can be loaded so. Load the original model that it was made from."
            )
    if config.llm_int8_skip_modules is not None:
        differing = sorted(quantizable_linears(model, config.llm_int8_skip_modules) ^ set(backends))
        if differing:
            raise ConfigError(
                "The checkpoint is quantised already, and quantization_config differs from it in "
                f"llm_int8_skip_modules={config.llm_int8_skip_modules}: {len(differing)} layers, the first is "
                f"{differing[0]}. Pass no quantization_config."
            )
    return replace_named_linears(model, backends, storage_dtype=storage_dtype)


def _method(config: Any) -> str:
    method = getattr(config, "quant_method", None)
    return str(getattr(method, "value", method))
