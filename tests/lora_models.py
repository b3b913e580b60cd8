"""`load_model` in small, and the stock model beside it, for the tests of adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from hf_fsdp_qlora.allocation import materialize
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.lora import add_adapter, initialize_adapters
from hf_fsdp_qlora.lora_config import check_peft_config
from hf_fsdp_qlora.quantization import backend_for_config
from hf_fsdp_qlora.sharding import write_full_tensor

SEED = 7
TOKENS = torch.arange(2, 34).view(2, 16)


def bnb_config(dtype: torch.dtype = torch.bfloat16) -> transformers.BitsAndBytesConfig:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def meta_model(
    path: Path, dtype: torch.dtype = torch.bfloat16, storage_dtype: torch.dtype = torch.uint8
) -> transformers.PreTrainedModel:
    """The model of a checkpoint on meta, all linears but the head quantized: what `load_model` has at that point."""
    config = transformers.AutoConfig.from_pretrained(path)
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    backend = backend_for_config(bnb_config(dtype), dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            parent = model.get_submodule(name.rpartition(".")[0])
            has_bias, sizes = module.bias is not None, (module.in_features, module.out_features)
            quantized = QuantizedLinear(*sizes, bias=has_bias, backend=backend, storage_dtype=storage_dtype)
            setattr(parent, name.rpartition(".")[2], quantized)
    return model


def fill_base(modules: dict[str, nn.Module], path: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint into the base modules, by the names they had before the adapter."""
    for key, value in transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict().items():
        owner, _, leaf = key.rpartition(".")
        module = modules[owner]
        if leaf == "weight" and isinstance(module, QuantizedLinear):
            codes, stats = module.backend.quantize(value.flatten(), value.numel(), lambda rows: rows)
            write_full_tensor(module.weight, codes.view(module.weight.dtype))
            write_full_tensor(module.weight_stats, stats.view(module.weight.dtype))
        else:
            write_full_tensor(getattr(module, leaf), value)


def load_with_adapter(
    path: Path,
    config: LoraConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    fill: Callable[[PeftModel], None] = lambda model: initialize_adapters(model, SEED),
) -> PeftModel:
    """`load_model` in small: inject on meta, allocate, fill the base, fill the adapter."""
    base = meta_model(path, dtype)
    check_peft_config(config, base)
    modules = dict(base.named_modules())
    model = add_adapter(base, config, adapter_dtype=adapter_dtype)
    assert all(parameter.is_meta for parameter in model.parameters())
    materialize(model, torch.device("cpu"))
    fill_base(modules, path, dtype)
    fill(model)
    return model


def stock_model(path: Path, config: LoraConfig, *, dtype: torch.dtype = torch.bfloat16, quantized: bool) -> PeftModel:
    """Stock transformers, stock bitsandbytes and stock PEFT on CPU."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=bnb_config(dtype) if quantized else None
    ).train()
    torch.manual_seed(SEED)
    return get_peft_model(model, copy.deepcopy(config))


def assert_same_tensors(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    assert ours.keys() == stock.keys()
    for key, value in ours.items():
        assert torch.equal(value.float(), stock[key].float()), key


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """Gradient of every trained parameter; all of them must have one."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found
    for name, gradient in found.items():
        assert gradient is not None, name
    return {name: gradient for name, gradient in found.items() if gradient is not None}
