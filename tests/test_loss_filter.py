"""Losses that are NaN or infinite count in the log as in stock, and nobody looks at them on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_fsdp_qlora.trainer_compat import loss_filter
from tests.tiny_models import save_tiny_model
from tests.trainer_story import make_trainer

SPOILED = {2: float("nan"), 3: float("inf"), 6: float("-inf")}
"""By number of the micro-batch, from 1."""


class Looks(TorchDispatchMode):
    """Counts how often a tensor becomes a number of Python, which waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Watch(TrainerCallback):
    """Where the run could see that the argument is off for a moment."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(args.logging_nan_inf_filter)

    on_pre_optimizer_step = on_step_end = on_log = on_save = on_substep_end


def run(model_path: str, output_dir: Path, *, filter_losses: bool = True) -> tuple[list[float], int, Watch]:
    """Losses as logged, how many numbers went to the host, and what callbacks saw, of eight micro-batches."""
    trainer = make_trainer(
        model_path, str(output_dir), max_steps=4, save_steps=2, logging_steps=2, gradient_accumulation_steps=2,
        logging_nan_inf_filter=filter_losses,
    )  # fmt: skip
    watch = Watch()
    trainer.add_callback(watch)
    stock: Any = trainer.compute_loss
    calls = 0

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return stock(*args, **kwargs) + SPOILED.get(calls, 0.0)

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    with Looks() as looks:
        trainer.train()
    assert calls == 8
    stored = torch.load(output_dir / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert stored.logging_nan_inf_filter == filter_losses
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], looks.count, watch


def test_logs_what_stock_logs_without_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(save_tiny_model(tmp_path / "model", dtype=torch.float32))
    losses, looks, watch = run(path, tmp_path / "ours")
    assert len(watch.seen) == 4 + 4 + 4 + 2 + 1 + 2 and all(watch.seen)
    monkeypatch.setattr(loss_filter, "attachment", lambda model: None)
    expected, looks_of_stock, _ = run(path, tmp_path / "stock")
    assert losses == pytest.approx(expected, rel=1e-6, nan_ok=True) and len(losses) == 2
    # isnan of every loss, isinf of those that are not NaN
    assert looks_of_stock - looks == 8 + 8 - 1


@pytest.mark.parametrize("ours", [True, False])
def test_nothing_of_it_stays_after_an_exception(ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the step and the sum of losses, where the argument is off; then training again, its first loss NaN."""
    if not ours:
        monkeypatch.setattr(loss_filter, "attachment", lambda model: None)
    path = str(save_tiny_model(tmp_path / "model", dtype=torch.float32))
    trainer = make_trainer(path, str(tmp_path / "out"), max_steps=2, save_strategy="no")
    stock: Any = trainer.training_step
    spoils = [torch.zeros(()), KeyError(), torch.tensor(float("nan")), *[torch.zeros(())] * 3]
    seen = []

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss, spoil = stock(*args, **kwargs), spoils.pop(0)
        seen.append(trainer.args.logging_nan_inf_filter)
        if isinstance(spoil, Exception):
            raise spoil
        return loss + spoil

    trainer.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        trainer.train()
    assert trainer.args.logging_nan_inf_filter
    trainer.train()
    first, second = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert not spoils and seen == [not ours] * 6
    assert first < 0.6 * second, "the NaN counts as the mean of none before it"


def test_a_step_that_nobody_adds_changes_nothing(tmp_path: Path) -> None:
    """By a callback, before a step whose loss is NaN, and by hand after training."""
    path = str(save_tiny_model(tmp_path / "model", dtype=torch.float32))

    class Probe(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.training_step(trainer.model, dict(batch))
            trainer.optimizer.zero_grad()

    logged: list[list[float]] = []
    for callback in (TrainerCallback(), Probe()):
        trainer: Any = make_trainer(
            path, str(tmp_path / "out"), max_steps=3, save_strategy="no", callbacks=[callback]
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        stock: Any = trainer.compute_loss

        def compute_loss(
            model: Any,
            inputs: Any,
            *args: Any,
            stock: Any = stock,
            batch: Any = batch,
            trainer: Any = trainer,
            **kwargs: Any,
        ) -> torch.Tensor:
            probing = torch.equal(inputs["input_ids"], batch["input_ids"])
            spoil = float("nan") if trainer.state.global_step == 1 and not probing else 0.0
            return stock(model, inputs, *args, **kwargs) + spoil

        trainer.compute_loss = compute_loss  # type: ignore[method-assign]
        trainer.train()
        trainer.training_step(trainer.model, dict(batch))
        assert trainer.args.logging_nan_inf_filter
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logged[0] == logged[1] and logged[0][1] == 0.0 and len(logged[0]) == 3


def test_off_if_the_user_says_so(tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path / "model", dtype=torch.float32))
    losses, _, watch = run(path, tmp_path / "ours", filter_losses=False)
    assert not any(watch.seen) and losses[0] != losses[0]
