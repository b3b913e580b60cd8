"""What the Trainer takes for the floating-point operations of our models: as for 16-bit ones, and counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from hf_fsdp_qlora import load_model
from hf_fsdp_qlora.trainer_compat import flops
from tests.lora_models import bnb_config, stock_model
from tests.tiny_models import save_tiny_model


class SomeTrainer:
    def __init__(self, model: Any) -> None:
        self.model = model


@pytest.mark.parametrize("architecture", ["llama", "qwen2"], ids=["head of its own", "head tied to the embedding"])
def test_weights_count_as_in_the_16_bit_model(tmp_path: Path, architecture: str) -> None:
    save_tiny_model(tmp_path, architecture)
    config = LoraConfig(r=4, target_modules="all-linear")
    ours = load_model(tmp_path, quantization_config=bnb_config(), peft_config=config, dtype=torch.bfloat16)
    stock: Any = stock_model(tmp_path, config, quantized=False)
    assert flops.num_weights(ours) == stock.num_parameters(exclude_embeddings=True)


def test_counted_when_loaded_and_not_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    ours: Any = SomeTrainer(load_model(tmp_path, dtype=torch.float32))
    wanted = ours.model.num_parameters(exclude_embeddings=True)
    monkeypatch.setattr(torch.nn.Module, "modules", None)
    count: Any = flops.patched_floating_point_ops(lambda trainer, inputs: -1)
    for tokens in (12, 20):
        assert count(ours, {"input_ids": torch.zeros(2, tokens // 2)}) == 6 * tokens * wanted
    assert count(ours, {"pixel_values": torch.zeros(3)}) == 0
    assert count(SomeTrainer(torch.nn.Linear(1, 1)), {"input_ids": torch.zeros(2)}) == -1, "other models: stock"
