"""Staging of the next visit's masters: allocated once, filled again, and never of masters that were replaced.

On the CPU, with a thread as on a GPU; ordinary memory stands for pinned memory, and copies need no stream.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fsdp_qlora.rotary import prefetch
from hf_fsdp_qlora.rotary.plan import Block, Plan
from hf_fsdp_qlora.rotary.prefetch import Prefetch
from hf_fsdp_qlora.rotary.schedule import Schedule
from tests.rotary_story import make_rotary_trainer, weights_of
from tests.tiny_models import save_tiny_model

KEPT: dict[str, Any] = {"active": 1, "steps_per_block": 1, "frozen": "int8", "moments": "keep"}
STEPS = 10
"""Two sweeps over two layers, embedding, norm and head."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes prefetching work without a GPU; the sizes of what was pinned."""
    sizes: list[int] = []
    begin = Prefetch.__init__

    def init(self: Prefetch, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self._pool = ThreadPoolExecutor(1)

    def pinned(numel: int, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(numel)
        return torch.empty(numel, dtype=dtype)

    monkeypatch.setattr(Prefetch, "__init__", init)
    monkeypatch.setattr(Prefetch, "_copy", lambda self, staged, out: out.copy_(staged))
    monkeypatch.setattr(prefetch, "_pinned", pinned)
    return sizes


def test_staging_is_allocated_once_and_changes_nothing(model_path: str, tmp_path: Path, allocated: list[int]) -> None:
    """Two sweeps with and without: the same weights, bit for bit."""
    trainer, staged = make_rotary_trainer(model_path, str(tmp_path), rotary=KEPT, max_steps=STEPS)
    trainer.train()
    assert len(allocated) == 1, "one allocation for all visits"
    trainer, late = make_rotary_trainer(model_path, str(tmp_path), rotary=KEPT, max_steps=STEPS)
    late.active._prefetch._pool = None
    trainer.train()
    assert len(allocated) == 1
    expected = weights_of(late)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(staged).items())


def test_nothing_is_allocated_where_no_block_enters(model_path: str, tmp_path: Path, allocated: list[int]) -> None:
    rotary = {**KEPT, "active": "100%"}
    trainer, _ = make_rotary_trainer(model_path, str(tmp_path), rotary=rotary, max_steps=3)
    trainer.train()
    assert not allocated


def test_going_back_to_a_checkpoint_forgets_what_was_staged(
    model_path: str, tmp_path: Path, allocated: list[int]
) -> None:
    """At the end of a run the next visit's masters are staged; a checkpoint has other ones, and rows are of those."""
    settings = {**KEPT, "order": "sequential", "always_active": ("embedding", "norm", "head")}
    trainer, rotary = make_rotary_trainer(
        model_path, str(tmp_path), rotary=settings, max_steps=5, save_strategy="steps", save_steps=3
    )
    trainer.train()  # visits layers 0, 1, 0, 1, 0, and begins one of layer 1; layer 0 is staged
    layer: Any = rotary.model.get_submodule("model.layers.0.mlp.up_proj")
    after = layer.dequantize()
    rotary.load_checkpoint(tmp_path / "checkpoint-3")  # before layer 0 was trained for the third time
    before = layer.dequantize()
    assert not torch.equal(before, after)
    name = "model.layers.0.mlp.up_proj.weight"
    backend, numel = layer.backend, before.numel()
    rows = backend.quantize(weights_of(rotary)[name].flatten(), numel, lambda rows: rows)
    assert torch.equal(before, backend.dequantize(*rows, before.shape))


@pytest.mark.parametrize("limits", [{"max_blocks": 1}, {"max_blocks": 3}, {"max_numel": 45}, {"max_numel": 100}])
@pytest.mark.parametrize("order", ["random", "sequential", "reverse"])
def test_no_visit_is_larger_than_the_staging(order: str, limits: dict[str, int]) -> None:
    blocks = tuple(Block(f"block {number}", "layer", (f"{number}",), 10 * (number + 1)) for number in range(5))
    plan = Plan(blocks, always=(0,), rotating=(1, 2, 3, 4), **limits)
    schedule = Schedule(plan, order=order, seed=0, coverage_floor=0.0)  # type: ignore[arg-type]
    visits = [[block for block in schedule.blocks_of_visit(visit) if block != 0] for visit in range(200)]
    largest = max(plan.numel_of(visit) for visit in visits)
    assert largest <= plan.largest_visit <= 140
    if order == "random" and "max_blocks" in limits:
        assert largest == plan.largest_visit
