"""The planner: counts against meta models, bytes against real rows, activations against a replay of the operators.

The replay runs transformers' own model with this package's layers on fake tensors (shapes without values) and follows
every allocation and release, so what it calls the peak is what an allocator would see, custom kernels' inner buffers
aside; those it adds. Fake tensors count as traced, so transformers builds attention masks: padded=True.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from hf_fsdp_qlora.activations import (
    LAYER_MOMENT,
    NORM_MOMENT,
    StepSettings,
    activations,
    layer_bytes,
)
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.lora import add_adapter
from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.memory_settings import MemorySettings, trainable_parameters
from hf_fsdp_qlora.model_shape import model_shape, shape_of
from hf_fsdp_qlora.quantization import backend_for_config
from hf_fsdp_qlora.quantization.bitsandbytes import dynamic_map
from hf_fsdp_qlora.skeleton import replace_linears
from tests.tiny_models import ARCHITECTURES, make_config

GIB = 2**30
LLAMA_8B: dict[str, Any] = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192,
)  # fmt: skip
LLAMA_70B: dict[str, Any] = dict(
    LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)


def meta_model(config) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "8b", "70b"])
def test_counts_equal_the_meta_model(name: str) -> None:
    config = {"8b": LlamaConfig(**LLAMA_8B), "70b": LlamaConfig(**LLAMA_70B)}.get(name) or make_config(name)
    model = meta_model(config)
    shape = shape_of(model, name)
    assert shape.total_numel == sum(parameter.numel() for parameter in model.parameters())
    settings = MemorySettings(lora_r=4, engine="none")
    backend = backend_for_config(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True), torch.bfloat16)
    replace_linears(model, backend, skip_modules=None, storage_dtype=torch.uint8)
    adapted = add_adapter(model, LoraConfig(r=4, target_modules="all-linear"))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trainable_parameters(shape, settings) == sum(parameter.numel() for parameter in trained)
    estimate = estimate_memory(shape, settings)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert estimate.gpu["weights"] == sum(layer.weight.numel() for layer in layers)
    assert estimate.gpu["statistics"] == sum(layer.weight_stats.numel() for layer in layers)
    packed = {id(p) for layer in layers for p in (layer.weight, layer.weight_stats)}
    frozen = [p for p in adapted.parameters() if not p.requires_grad and id(p) not in packed]
    assert estimate.gpu["other_weights"] == sum(parameter.numel() * 2 for parameter in frozen)


class PeakTracker(TorchDispatchMode):
    """Bytes in storages that operators create, the most at one time."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.sizes, self.now, self.peak = known, dict[int, int](), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inner = 0
        if "quantized_linear" in str(function):
            out_features, in_features = [x for x in args if isinstance(x, int)][-2:]
            inner = out_features * in_features * 2 + out_features * in_features // 64 * 4
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and key not in self.known:
                    self.sizes[key] = storage.nbytes()
                    self.now += self.sizes[key]
                    weakref.finalize(storage, self._release, key)
        self.peak = max(self.peak, self.now + inner)
        return result

    def _release(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


class _Loss(torch.autograd.Function):
    """Stands for the head: its gradient arrives, nothing of it is kept."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.like = hidden.shape, hidden.dtype
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return torch.empty(ctx.like[0], dtype=ctx.like[1])


def replayed_peak(
    config, *, batch_size: int, seq_len: int, lora: LoraConfig, checkpointing: bool, quantized: bool
) -> int:
    """Peak bytes of activations in backward, the gradients of adapters included, the head left out."""
    model = meta_model(config)
    backend = backend_for_config(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True), torch.bfloat16)
    if quantized:
        replace_linears(model, backend, skip_modules=None, storage_dtype=torch.uint8)
    adapted: Any = add_adapter(model, lora)
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    adapted.train()
    dynamic_map(torch.device("cpu"))  # cached: fake tensors could not make it
    with FakeTensorMode(allow_non_fake_inputs=True):
        adapted.to_empty(device="cpu")
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)
        tracker = PeakTracker({parameter.untyped_storage()._cdata for parameter in adapted.parameters()})
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = adapted.base_model.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            loss = _Loss.apply(hidden)
            del hidden
            tracker.peak = tracker.now
            loss.backward()
    return tracker.peak


def wide_config(name: str) -> Any:
    """An architecture at a size where activations are hundreds of MiB: four layers of a 1B model."""
    class_name, values = ARCHITECTURES[name]
    sizes = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16,
                 num_key_value_heads=4, head_dim=128, vocab_size=32000, sliding_window=4096,
                 max_position_embeddings=4096)  # fmt: skip
    return getattr(transformers, class_name)(**{**values, **{k: v for k, v in sizes.items() if k in values}})


RUNS: dict[str, dict[str, Any]] = {
    "short": dict(),
    "long": dict(seq_len=8192),
    "batch": dict(batch_size=4),
    "stored": dict(checkpointing=False),
    "attention_only": dict(targets=["q_proj", "v_proj"]),
    "attention_only_long": dict(targets=["q_proj", "v_proj"], seq_len=8192),
    "rank_64": dict(rank=64),
    "70b": dict(shape=LLAMA_70B),
    "16_bit": dict(quantized=False),
    "16_bit_batch": dict(quantized=False, batch_size=16),
    "16_bit_stored": dict(quantized=False, checkpointing=False),
}


def compare(
    config, *, batch_size=1, seq_len=2048, targets="all-linear", rank=16, checkpointing=True, quantized=True
) -> float:
    """Predicted over replayed bytes."""
    lora = LoraConfig(r=rank, target_modules=targets)
    peak = replayed_peak(
        config, batch_size=batch_size, seq_len=seq_len, lora=lora, checkpointing=checkpointing, quantized=quantized
    )
    shape = model_shape(config)
    step = StepSettings(
        batch_size=batch_size, seq_len=seq_len, compute_bytes=2, lora=frozenset(shape.targeted(targets)),
        lora_r=rank, dropout=False, fused_lora=quantized, checkpointing=checkpointing, padded=True,
        quantized=quantized, block_size=64, trains_head=False, head_is_cast=False, trains_base=False,
    )  # fmt: skip
    moments = activations(shape, step)
    return max(moments[LAYER_MOMENT].total_bytes, moments[NORM_MOMENT].total_bytes) / peak


@pytest.mark.parametrize("name", RUNS)
def test_activations_agree_with_the_replay(name: str) -> None:
    """Within 5 %, the planner's own goal. Gradients of adapters are in the replay only: at most 1 % here."""
    run = dict(RUNS[name])
    config = LlamaConfig(**{**LLAMA_8B, **run.pop("shape", {}), "num_hidden_layers": 4, "vocab_size": 32000})
    assert compare(config, **run) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_of_every_architecture_agree_with_the_replay(name: str) -> None:
    assert compare(wide_config(name)) == pytest.approx(1, abs=0.05)


def test_layer_bytes_of_a_plain_mlp_are_fewer() -> None:
    settings: dict[str, Any] = dict(
        batch_size=1, seq_len=128, compute_bytes=2, lora=frozenset(), lora_r=1, dropout=False, fused_lora=True,
        checkpointing=True, padded=False, quantized=True, block_size=64, trains_head=False, head_is_cast=False,
        trains_base=False,
    )  # fmt: skip
    step = StepSettings(**settings)
    plain, gated = (layer_bytes(model_shape(wide_config(name)), step) for name in ("gpt_neox", "llama"))
    assert plain < gated
