"""Rotary training on a GPU: masters staged ahead, 8-bit moments, memory that parking gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fsdp_qlora.rotary import prefetch
from hf_fsdp_qlora.rotary.prefetch import Prefetch
from tests.rotary_story import make_rotary_trainer, weights_of
from tests.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ON_GPU: dict[str, Any] = dict(use_cpu=False, dtype=torch.bfloat16, bf16=True, gradient_accumulation_steps=1)
SIZES: dict[str, Any] = dict(hidden_size=256, intermediate_size=1024)
"""Layers of 1.1M weights: a piece of the optimizer holds several, and bitsandbytes keeps 8 bits for all."""


@pytest.mark.parametrize(
    ("optim", "master_dtype"),
    [("adamw_8bit", "bfloat16"), ("adamw_torch_fused", "float32"), ("adamw_torch", "bfloat16")],
)
def test_staged_masters_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, master_dtype: str
) -> None:
    """Two sweeps with kept moments, with and without prefetching: the same weights, bit for bit."""
    model = str(save_tiny_model(tmp_path / "model", num_hidden_layers=2, **SIZES))
    rotary = {"active": 1, "steps_per_block": 1, "frozen": "int8", "master_dtype": master_dtype, "moments": "keep"}
    staged: list[str] = []
    pinned: list[int] = []
    load, pin = Prefetch.load, prefetch._pinned

    def pinning(numel: int, dtype: torch.dtype) -> torch.Tensor:
        pinned.append(numel)
        return pin(numel, dtype)

    def counted(self: Prefetch, name: str, out: torch.Tensor) -> None:
        staged.extend([name] if name in self._staged else [])
        load(self, name, out)

    monkeypatch.setattr(Prefetch, "load", counted)
    monkeypatch.setattr(prefetch, "_pinned", pinning)
    ahead, first = _train(model, tmp_path, rotary=rotary, optim=optim)
    assert len(staged) > 20 and len(pinned) == 1
    monkeypatch.setattr(Prefetch, "start", lambda self, names: None)
    late, second = _train(model, tmp_path, rotary=rotary, optim=optim)
    assert first == second
    assert all(torch.equal(ahead[name], weight) for name, weight in late.items())


def _train(model_path: str, tmp_path: Path, **kwargs: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Two sweeps over embedding, norm, head and two layers."""
    trainer, rotary = make_rotary_trainer(model_path, str(tmp_path / "run"), **{**ON_GPU, "max_steps": 10, **kwargs})
    trainer.train()
    return weights_of(rotary), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_device_memory_is_what_the_callback_says_and_parking_gives_it_back(tmp_path: Path) -> None:
    trainer, rotary = make_rotary_trainer(
        str(save_tiny_model(tmp_path / "model", num_hidden_layers=4, **SIZES)), str(tmp_path / "run"),
        optim="adamw_8bit", max_steps=14, **ON_GPU,
        rotary={"active": 1, "steps_per_block": 2, "frozen": "int8", "master_dtype": "bfloat16"},
    )  # fmt: skip
    before = torch.cuda.memory_allocated()
    trainer.train()
    logged = [entry["rotary/device_bytes_per_parameter"] for entry in trainer.state.log_history if "loss" in entry]
    assert 1 < max(logged) < 2, "a quarter in 16 bit with 8-bit moments, the rest in 8 bit"
    torch.cuda.synchronize()
    # Every block has been active. What is left beside the model: cuBLAS workspaces and the trainer's few numbers.
    assert torch.cuda.memory_allocated() - before < 2**25
    assert not rotary.active.slices
