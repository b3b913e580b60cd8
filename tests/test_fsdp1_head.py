"""A head with biases under FSDP1: TRL's fused head reads its weight outside its forward, so it must be in the root,
also where an odd number of 16-bit biases lies behind it. Reference: the same run under FSDP2 with one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig

from tests.trainer_story import launch, make_trainer, report


def losses(model_path: str, output_dir: str) -> list[float]:
    trainer = make_trainer(model_path, output_dir, dtype=torch.bfloat16, max_steps=2, save_strategy="no")
    trainer.train()
    return report(trainer)["losses"]


def test_a_head_with_an_odd_number_of_biases_trains_in_the_root(tmp_path: Path) -> None:
    config = PhiConfig(
        hidden_size=96, intermediate_size=224, num_hidden_layers=2, num_attention_heads=4, vocab_size=259,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    path = str(tmp_path / "phi")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    [expected] = launch("fsdp2-one-rank", losses, path, str(tmp_path / "fsdp2"))
    for found in launch("fsdp1-orig", losses, path, str(tmp_path / "fsdp1")):
        assert found == pytest.approx(expected, rel=2e-3)  # bf16, and each rank sees one of the two samples
