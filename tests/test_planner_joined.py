"""The planner on compiled layers that compute together: against peaks that a GPU showed, and torch's partitioner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig

from hf_fsdp_qlora import load_model, memory_joined, siblings
from hf_fsdp_qlora.lora import ADAPTER_NAME
from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.memory_compiled import compiled_backward_bytes, compiled_layer_bytes
from hf_fsdp_qlora.memory_joined import joins
from hf_fsdp_qlora.memory_settings import GIB
from hf_fsdp_qlora.memory_step import step_settings
from hf_fsdp_qlora.model_shape import ModelShape, model_shape
from hf_fsdp_qlora.quantization.bitsandbytes import FourBitBackend
from hf_fsdp_qlora.skeleton import decoder_layers
from tests.lora_models import bnb_config
from tests.test_planner_compiled import COMPILED, LLAMA_8B, kept_by_the_partitioner
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return model_shape(LlamaConfig(**LLAMA_8B))


@pytest.mark.parametrize(
    ("budget", "batch_size", "measured"),
    [(0.0, 1, 6.61), (0.3, 4, 18.17), (0.4, 4, 21.17), (0.45, 4, 22.82), (1.0, 1, 14.38)],
)
def test_joined_8b_takes_what_was_measured(
    shape: ModelShape, budget: float, batch_size: int, measured: float
) -> None:  # fmt: skip
    """The peaks of RESULTS.md, adapters in bfloat16: within 1 %, and not below by more than their rounding."""
    peak = estimate_memory(
        shape, COMPILED, activation_budget=budget, batch_size=batch_size, adapter_dtype="bfloat16"
    ).peak_bytes  # fmt: skip
    assert measured - 0.005 <= peak / GIB <= 1.01 * measured


@torch.library.custom_op("test_planner_joined::wide", mutates_args=())
def wide_op(lora_b: list[Tensor], rows: int, columns: int, used_with: Tensor) -> Tensor:
    """One operation, as the kernel is on CUDA."""
    return lora_b[0].new_empty(rows, columns)


@wide_op.register_fake
def _(lora_b, rows, columns, used_with):  # type: ignore[no-untyped-def]
    return lora_b[0].new_empty(rows, columns)


@pytest.mark.parametrize(
    ("architecture", "key_heads", "budgets", "one_product"),
    [("llama", 4, (0.35, 0.8, 1.0), 2**30), ("llama", 1, (0.6, 0.8, 1.0), 2**21), ("qwen3", 2, (0.9, 1.0), 2**21)],
)
def test_joined_layers_keep_what_the_planner_says(
    architecture: str, key_heads: int, budgets: tuple[float, ...], one_product: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Within 1 % where all that is expensive is kept, else a bound: attention's output is among it on some GPUs. With
    one product for gate and up, and with two; with norms of query and key."""
    monkeypatch.setattr(siblings, "ONE_PRODUCT_BYTES", one_product)
    monkeypatch.setattr(memory_joined, "ONE_PRODUCT_BYTES", one_product)
    monkeypatch.setattr(FourBitBackend, "joins", lambda self, wide: True)
    monkeypatch.setattr(
        FourBitBackend, "dequantize_wide",
        lambda self, codes, stats, lora_b, wide, used_with: wide_op(list(lora_b), *wide.shape, used_with),
    )  # fmt: skip
    tokens = 256
    folder = save_tiny_model(
        tmp_path, architecture, hidden_size=512, intermediate_size=1792, num_attention_heads=4, head_dim=128,
        num_key_value_heads=key_heads, max_position_embeddings=tokens,
    )  # fmt: skip
    model: Any = load_model(
        folder, peft_config=LoraConfig(r=8, target_modules="all-linear"), fsdp="none", dtype=torch.bfloat16,
        quantization_config=bnb_config(torch.bfloat16),
    )  # fmt: skip
    siblings.join_siblings(model, ADAPTER_NAME)
    model.enable_input_require_grads()
    model.train()
    layer = decoder_layers(model.get_base_model())[0]
    step = step_settings(model_shape(folder), replace(COMPILED, lora_r=8, seq_len=tokens))
    for budget in budgets:
        kept = kept_by_the_partitioner(model, layer, tokens, monkeypatch, budget)
        planned = compiled_layer_bytes(model_shape(folder), step, budget)
        attention = 2 * tokens * 512
        assert 0.99 * kept <= planned <= 1.01 * kept + (attention if budget < 1 else 0), budget


def test_the_backward_of_a_layer_takes_what_its_code_allocates(shape: ModelShape) -> None:
    """MiB that benchmarks/compiled_memory.py finds in inductor's code (torch 2.13): for one sequence and for four,
    where what the MLP fuses is largest, and for a short one, where two weights are. Of one sequence with everything
    kept the planner does not know in which order MLP out makes its gradients: up to 9 % too much."""

    def peak(budget: float, **settings: Any) -> float:
        step = step_settings(shape, replace(COMPILED, **settings))
        return compiled_backward_bytes(shape, step, budget) / 2**20

    for budget, found in ((0.0, 531.1), (0.3, 473.1), (0.4, 497.1), (0.6, 464.5), (0.8, 513.4), (1.0, 477.7)):
        assert 0.995 * found <= peak(budget) <= (1.09 if budget == 1 else 1.01) * found, budget
    for budget, found in ((0.0, 2117.2), (0.4, 1986.6), (0.5, 1760.7), (1.0, 1717.0)):
        assert 0.995 * found <= peak(budget, batch_size=4) <= 1.01 * found, budget
    for budget, found in ((0.0, 294.3), (0.4, 285.5), (1.0, 290.5)):
        assert 0.99 * found <= peak(budget, seq_len=512) <= 1.01 * found, budget
    for budget, found in ((0.0, 554.9), (0.8, 513.4), (1.0, 505.7)):
        assert found <= peak(budget, padded=True) <= (1.09 if budget == 1 else 1.025) * found, budget


def test_which_layers_join(shape: ModelShape) -> None:
    def joined(**settings: Any) -> bool:
        return joins(shape, step_settings(shape, replace(COMPILED, **settings)))

    assert joined() and joined(quant_format="fp4") and joined(target_modules=("q_proj", "v_proj"))
    assert not joined(method="lora") and not joined(quant_format="hqq") and not joined(quant_format="int8")
    assert not joined(target_modules=("q_proj", "up_proj")) and not joined(lora_r=3)
    assert not joined(compile_layers=False)
    assert memory_joined.ONE_PRODUCT_BYTES == siblings.ONE_PRODUCT_BYTES
    apart = estimate_memory(shape, COMPILED, quant_format="hqq", activation_budget=0.0)
    assert (
        apart.gpu["dequantized_and_passing"]
        > estimate_memory(shape, COMPILED, activation_budget=0.0).gpu["dequantized_and_passing"]
    )


def test_settings_of_partly_joined_layers_are_planned(shape: ModelShape) -> None:
    """Query and value alone, as PEFT chooses: the value does not hold the query, and the MLP has no LoRA."""
    both, one = (
        compiled_layer_bytes(shape, step_settings(shape, replace(COMPILED, target_modules=target)), 1.0)
        for target in (("q_proj", "v_proj"), ("q_proj",))
    )
    adapter_and_its_product = 2 * 16 * (4096 + 1024) + 2 * 16 * 2048
    assert both - one == adapter_and_its_product
