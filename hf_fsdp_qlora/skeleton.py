"""The model without its weights: built on the meta device, its linear layers replaced by `QuantizedLinear`.

Buffers that no checkpoint holds (rotary frequencies, embedding scales) are real from the start. What the package
cannot load yet is refused here, by name, before a byte of the checkpoint is read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.quantization import QuantizationBackend

logger = logging.getLogger(__name__)


def build_skeleton(
    model_name_or_path: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    hub_kwargs: dict[str, Any],
    model_kwargs: dict[str, Any],
) -> PreTrainedModel:
    """The causal language model that a config describes, parameters on meta, in eval mode as `from_pretrained`.

    Args:
        dtype: of all parameters.
        hub_kwargs: `revision`, `token`, `cache_dir`, ...
        model_kwargs: `attn_implementation` and config fields, as `from_pretrained` takes them.

    Raises:
        ConfigError: the model is of a kind that cannot be loaded.
    """
    attention = {key: model_kwargs.pop(key) for key in ("attn_implementation",) if key in model_kwargs}
    config, unused = AutoConfig.from_pretrained(
        model_name_or_path,
        trust_remote_code=trust_remote_code,
        return_unused_kwargs=True,
        **hub_kwargs,
        **model_kwargs,
    )
    unused = {key: value for key, value in unused.items() if key not in hub_kwargs}
    if unused:
        raise ConfigError(
            f"load_model() got arguments that are neither its own nor fields of {type(config).__name__}: "
            f"{', '.join(sorted(unused))}."
        )
    _refuse_unsupported_config(config)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **attention)
    model.tie_weights()
    _refuse_float32_modules(model, dtype)
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(model_name_or_path, **hub_kwargs)
        except OSError:
            logger.debug("no generation config in %s; using the one made from its config", model_name_or_path)
    return model.eval()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that transformers says must not be split: one FSDP unit each.

    Raises:
        ConfigError: the model names no such class.
    """
    classes = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in classes]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} names no decoder layer class (_no_split_modules), so it is not known what to "
            "shard together. Models with custom code must set it."
        )
    return layers


def replace_linears(
    model: PreTrainedModel,
    backend: QuantizationBackend,
    *,
    skip_modules: list[str] | None,
    storage_dtype: torch.dtype,
) -> list[str]:
    """Put a `QuantizedLinear` in the place of every linear layer that stock transformers would quantise.

    Args:
        skip_modules: what the config leaves alone; None means transformers' default (the head and tied weights).

    Returns:
        Names of the linear layers left as they were, for the report.

    Raises:
        ConfigError: a decoder layer has weights that would silently stay unquantised, or nothing is quantised.
    """
    names = quantizable_linears(model, skip_modules)
    kept = replace_named_linears(
        model, dict.fromkeys(names, backend), storage_dtype=storage_dtype, skip=_skipped(model, skip_modules)
    )
    if not names:
        raise ConfigError(
            f"quantization_config quantises nothing in {type(model).__name__}: every linear layer matches "
            f"the modules to skip, {skip_modules}. Remove entries, or pass quantization_config=None."
        )
    return kept


def quantizable_linears(model: PreTrainedModel, skip_modules: list[str] | None) -> set[str]:
    """Names of the linear layers that stock transformers would quantise; the head is never one of them."""
    skip = _skipped(model, skip_modules)
    head = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and should_convert_module(name, skip)
    }


def replace_named_linears(
    model: PreTrainedModel,
    backends: Mapping[str, QuantizationBackend],
    *,
    storage_dtype: torch.dtype,
    skip: list[str] | None = None,
) -> list[str]:
    """Put a `QuantizedLinear` in the place of these linear layers, whatever stock transformers would do.

    Args:
        backends: the format of each, by name.
        skip: patterns of what is left in 16 bit knowingly; by default every other linear layer.

    Returns and raises as `replace_linears`.
    """
    kept: list[str] = []
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        if name not in backends:
            kept.append(name)
            continue
        backends[name].check_weight(name, (module.out_features, module.in_features))
        replacement = QuantizedLinear(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            backend=backends[name],
            storage_dtype=storage_dtype,
        )
        model.set_submodule(name, replacement)
    _refuse_unquantized_weights(model, kept if skip is None else skip)
    return kept


def _refuse_unsupported_config(config: PretrainedConfig) -> None:
    name = type(config).__name__
    if config.is_encoder_decoder:
        raise ConfigError(f"{name} is an encoder-decoder model; only decoder-only language models can be loaded.")
    if config.sub_configs and config.get_text_config() is not config:
        raise ConfigError(
            f"{name} is a multimodal model; only text models can be loaded. Save its language model, "
            "head included, as a causal language model of its own and load that."
        )
    if type(config) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in (
        getattr(config, "auto_map", None) or {}
    ):
        raise ConfigError(f"transformers has no causal language model for {name}.")


def _skipped(model: PreTrainedModel, skip_modules: list[str] | None) -> list[str]:
    return HfQuantizer.get_modules_to_not_convert(model, skip_modules, sorted(model._keep_in_fp32_modules or ()))


def _refuse_float32_modules(model: PreTrainedModel, dtype: torch.dtype) -> None:
    wanted = sorted({*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())})
    if wanted and dtype != torch.float32:
        raise ConfigError(
            f"{type(model).__name__} keeps {', '.join(wanted)} in float32, which a {dtype} run would round. "
            "Pass dtype=torch.float32."
        )


def _refuse_unquantized_weights(model: PreTrainedModel, skip: list[str]) -> None:
    """Only `nn.Linear` itself is replaced; any other matrix of a decoder layer must be skipped knowingly."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    left = [
        (f"{name}.{key}", module, parameter)
        for name, module in model.named_modules()
        if id(module) in inside and not isinstance(module, QuantizedLinear) and should_convert_module(name, skip)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]
    for name, module, parameter in sorted(left, key=lambda entry: -entry[2].dim()):
        kind = type(module).__name__
        if parameter.dim() >= 3:
            raise ConfigError(
                f"{name} of shape {tuple(parameter.shape)} ({kind}) holds fused experts, which would stay "
                "unquantised. Mixture-of-experts models are not supported; use a dense model."
            )
        if isinstance(module, Conv1D):
            raise ConfigError(
                f"{name} belongs to a transformers Conv1D (GPT-2 family), whose weight is transposed; it would stay "
                "unquantised. Use a model with nn.Linear layers."
            )
        raise ConfigError(
            f"{name} ({kind}) would stay unquantised: only nn.Linear itself is replaced. Add "
            f"{name.split('.')[-2]!r} to the modules that the config skips (llm_int8_skip_modules for bitsandbytes) "
            "to keep it in 16 bit knowingly."
        )
