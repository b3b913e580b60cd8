"""Precision presets: what each of them makes of a model, and the combinations that are refused.

Reference for rotary positions: angles in float64. `inv_freq` in float32 is off by at most 2048 * 2**-24 = 1.2e-4 rad
at position 2048; rounded to bfloat16 it would be off by 0.9.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig
from torch import Tensor

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.loading import load_model
from hf_fsdp_qlora.precision import PRESETS, recipe_values, resolve_precision
from hf_fsdp_qlora.validation import validate
from tests.distributed import run_distributed
from tests.loading_story import CPU, FSDP2, LORA, batch, nf4
from tests.test_fsdp1 import FSDP1, wrap
from tests.tiny_models import save_tiny_model

ENGINES = {"one process": (1, CPU), "fsdp1": (2, FSDP1), "fsdp2": (2, FSDP2)}
POSITION = 2048


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    return str(save_tiny_model(path, "llama", max_position_embeddings=4096))


def look(path: str, precision: str) -> dict[str, Any]:
    model: Any = load_model(path, quantization_config=nf4(), peft_config=LORA, precision=precision)
    inner, storage = model, {m.weight.dtype for m in model.modules() if isinstance(m, QuantizedLinear)}
    adapters = {p.dtype for p in model.parameters() if p.requires_grad}
    if inner.hf_fsdp_qlora_attachment.engine == "fsdp1":
        model = wrap(model, use_orig_params=True)
    seen: dict[str, set[torch.dtype]] = {"adapter": set(), "product": set()}

    def watch(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        kind = "product" if isinstance(module, QuantizedLinear) else "adapter"
        seen[kind].add(output.dtype)

    for name, module in inner.named_modules():
        if isinstance(module, QuantizedLinear) or (name.endswith("lora_A.default")):
            module.register_forward_hook(watch)
    model.train()
    loss = model(**batch()).loss
    loss.backward()
    grads = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    rotary = next(m for m in inner.modules() if type(m).__name__ == "LlamaRotaryEmbedding")
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.tensor([[POSITION]]))
    return {
        "loss": loss.item(), "storage": storage, "adapters": adapters, "grads": grads, "inv_freq": rotary.inv_freq,
        "cos": cos.flatten(), "sin": sin.flatten(), **seen,
    }  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PRESETS)
def test_preset_sets_every_dtype(name: str, engine: str, llama: str) -> None:
    preset = PRESETS[name]
    world_size, env = ENGINES[engine]
    storage = {"one process": torch.uint8, "fsdp1": preset.dtype, "fsdp2": torch.float32}[engine]
    for seen in run_distributed(look, llama, name, world_size=world_size, env=env, process_group=world_size > 1):
        assert seen["storage"] == {storage}
        assert seen["adapters"] == seen["grads"] == {preset.adapter_dtype}
        assert seen["loss"] == pytest.approx(5.56, rel=0.02)
        if engine != "one process":  # there accelerate's autocast decides in what fp32 adapters compute
            assert seen["adapter"] == {preset.autocast_dtype or preset.dtype}
        # Angles: off by rounding of float32, not by a bfloat16 inv_freq.
        exact = (POSITION * 10000.0 ** (-torch.arange(0, 24, 2, dtype=torch.float64) / 24)).repeat(2)
        assert seen["inv_freq"].dtype == torch.float32
        torch.testing.assert_close(seen["cos"].double(), exact.cos(), rtol=0, atol=3e-4)
        torch.testing.assert_close(seen["sin"].double(), exact.sin(), rtol=0, atol=3e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(precision="fp16"), "65504.*Attempting to unscale FP16.*bf16_fp32_adapters"),
        (dict(precision="bf17"), "'bf17' is unknown; use one of bf16_fp32_adapters"),
        (dict(precision="fp32", dtype="bfloat16"), "precision='fp32' means dtype=torch.float32, but dtype=torch.bfl"),
        (dict(precision="bf16", adapter_dtype=torch.float32), "precision='bf16' means adapter_dtype=torch.bfloat16"),
        (dict(adapter_dtype="int8"), "adapter_dtype='int8' is not one"),
        (
            dict(precision="fp32", quantization_config=nf4(bnb_4bit_compute_dtype="bfloat16")),
            "precision='fp32' computes in torch.float32, but bnb_4bit_compute_dtype=torch.bfloat16",
        ),
    ],
)
def test_contradictions_are_refused_with_the_pair(llama: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(llama, **{"quantization_config": nf4(), **arguments})


def refuse(path: str, arguments: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(path, **{"quantization_config": nf4(), "peft_config": LORA, **arguments})
    return str(caught.value)


REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "fp16 launcher": ({**FSDP1, "ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "mixed_precision: fp16 with 4-bit weights"),
    "bf16 launcher": ({**FSDP2, "ACCELERATE_MIXED_PRECISION": "bf16"}, dict(precision="fp32"),
                      "precision='fp32' with mixed_precision: bf16"),
    "fp16": (FSDP1, dict(dtype="float16"), "dtype=torch.float16 with FSDP1"),
    "storage": (FSDP1, dict(quantization_config=nf4(bnb_4bit_quant_storage="float32")),
                "bnb_4bit_quant_storage=torch.float32 with FSDP1 and dtype=torch.bfloat16"),
    "offload": (FSDP1, dict(offload="all"), "offload='all' with FSDP1 needs an accelerator"),
    "no adapter": (FSDP1, dict(peft_config=None), "FSDP1 without an adapter"),
    "dora": (FSDP1, dict(peft_config=LoraConfig(use_dora=True, target_modules="all-linear")),
             "use_dora does not work"),
    "head": (FSDP1, dict(peft_config=LoraConfig(modules_to_save=["lm_head"], target_modules="all-linear")),
             "modules_to_save does not work under FSDP1: .*lm_head"),
    "bias": (FSDP1, dict(peft_config=LoraConfig(bias="lora_only", target_modules="all-linear")),
             "bias does not work under FSDP1: .*q_proj"),
    "tied": (FSDP1, dict(peft_config=LoraConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True,
                                                target_modules=["q_proj"])), "does not work under FSDP1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_damage_bytes_is_refused_before_loading(case: str, llama: str, tmp_path: Path) -> None:
    env, arguments, message = REFUSED[case]
    # Qwen 2 has biases and tied embeddings.
    path = str(save_tiny_model(tmp_path, "qwen2")) if case in ("bias", "tied") else llama
    for text in run_distributed(refuse, path, arguments, env=env):
        assert re.search(message, text), text


def test_matching_storage_is_accepted_under_fsdp1(llama: str) -> None:
    for seen in run_distributed(storage_of, llama, env=FSDP1):
        assert seen == {torch.bfloat16}


def storage_of(path: str) -> set[torch.dtype]:
    model = load_model(path, quantization_config=nf4(bnb_4bit_quant_storage="bfloat16"), peft_config=LORA)
    return {m.weight.dtype for m in model.modules() if isinstance(m, QuantizedLinear)}


def test_float16_out_of_range_is_what_the_refusal_says() -> None:
    """The reason in FP16_REASON, with bitsandbytes itself."""
    weights = torch.randn(64 * 1024)
    weights[5] = 1e5
    for nested, spoiled in ((False, 63), (True, weights.numel())):
        codes, state = bnb.quantize_4bit(weights.half(), quant_type="nf4", compress_statistics=nested)
        assert int(bnb.dequantize_4bit(codes, state).isnan().sum()) == spoiled


def test_presets_mean_the_same_in_recipes() -> None:
    assert recipe_values("fp32_autocast") == {"dtype": "float32", "adapter_dtype": "float32", "bf16": True}
    assert recipe_values("bf16") == {"dtype": "bfloat16", "adapter_dtype": "bfloat16", "bf16": True}
    assert resolve_precision(None) == resolve_precision(None, dtype="bfloat16", adapter_dtype="float32")
    base = {"model_name_or_path": "x", "use_peft": True, "load_in_4bit": True}
    validate({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, {**base, "precision": "fp32_autocast"})
    with pytest.raises(ConfigError, match="precision='fp32' means dtype"):
        validate({"distributed_type": "NO"}, {**base, "precision": "fp32", "dtype": "bfloat16"})
