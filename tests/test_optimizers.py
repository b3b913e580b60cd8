"""8-bit, paged and factored optimizers: what they do on every engine, and what is refused because of it.

References: the same optimizer on one process; an uninterrupted run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fsdp_qlora.errors import ConfigError
from tests.tiny_models import save_tiny_model
from tests.trainer_story import adapter, assert_equal, launch, make_trainer, report, train

# bitsandbytes keeps 32-bit states for fewer than 4,096 numbers: rank 128 makes LoRA's matrices larger, halves too.
LORA = {"r": 128}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.float32))


def train_and_look(model_path: str, output_dir: str, optim: str, **kwargs: Any) -> dict[str, Any]:
    """Train without saving, and say which dtypes the states have."""
    trainer = make_trainer(model_path, output_dir, optim=optim, lora=LORA, save_strategy="no", **kwargs)
    trainer.train()
    assert trainer.optimizer is not None
    values = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return {**report(trainer), "states": {v.dtype for v in values if isinstance(v, torch.Tensor)}}


@pytest.mark.parametrize(
    ("run", "optim"),
    [("one-process", "adamw_8bit"), ("one-process", "paged_adamw_32bit"), ("ddp", "paged_adamw_8bit")],
)
def test_resuming_on_one_gpu_and_ddp_is_exact(run: str, optim: str, model_path: str, tmp_path: Path) -> None:
    """On the CPU "paged" falls back to ordinary memory; the rest of the path is the same."""
    settings: dict[str, Any] = dict(optim=optim, lora=LORA)
    [whole, *_] = launch(run, train, model_path, str(tmp_path / "whole"), **settings)
    resume = str(tmp_path / "whole" / "checkpoint-2")
    [resumed, *_] = launch(run, train, model_path, str(tmp_path / "resumed"), resume=resume, **settings)
    assert resumed["losses"] == whole["losses"]
    assert_equal(adapter(tmp_path / "resumed" / "final"), adapter(tmp_path / "whole" / "final"))


@pytest.mark.parametrize(
    ("run", "optim", "rel"), [("fsdp1-flat", "adamw_8bit", 2e-4), ("fsdp1-orig", "paged_adamw_32bit", 1e-6)]
)
def test_fsdp1_trains_with_states_of_its_shards(
    run: str, optim: str, rel: float, model_path: str, tmp_path: Path
) -> None:
    [expected] = launch("one-process", train_and_look, model_path, str(tmp_path), optim)
    for result in launch(run, train_and_look, model_path, str(tmp_path), optim):
        # Blocks of 8-bit states begin elsewhere in a shard; those of 32 bit differ by the order of sums alone.
        assert result["losses"] == pytest.approx(expected["losses"], rel=rel)
        assert (torch.uint8 in result["states"]) == ("8bit" in optim)


def refuse(model_path: str, output_dir: str, optim: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make_trainer(model_path, output_dir, optim=optim)
    return str(caught.value)


@pytest.mark.parametrize(
    ("run", "optim", "message"),
    [
        ("fsdp2-full", "paged_adamw_8bit", "(?s)optim: paged_adamw_8bit.*do not take the DTensors"),
        ("fsdp2-one-rank", "adafactor", "(?s)optim: adafactor.*do not take the DTensors"),
        ("fsdp1-flat", "adamw_8bit", "(?s)trains under FSDP1, but its state cannot be saved.*save_only_model: true"),
        ("fsdp1-orig", "adafactor", "factors matrices; under FSDP1 parameters are flat shards"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    run: str, optim: str, message: str, model_path: str, tmp_path: Path
) -> None:
    for text in launch(run, refuse, model_path, str(tmp_path), optim):
        assert re.search(message, text), text
