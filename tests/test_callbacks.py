"""Callbacks with the stock SFTTrainer: what reaches the logs, what stops a run, and what an interruption leaves."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_fsdp_qlora.callbacks import (
    REPEAT_WINDOW_S,
    InterruptCallback,
    MemoryCallback,
    ThroughputCallback,
    WeightIntegrityCallback,
)
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.integrity import IntegrityError
from hf_fsdp_qlora.linear import QuantizedLinear
from tests.distributed import run_distributed
from tests.tiny_models import save_tiny_model
from tests.trainer_story import launch_env, make_trainer, report, train

RANKS: dict[str, Any] = dict(env=launch_env("fsdp2"), process_group=False)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.float32))


class _Reporter(TrainerCallback):
    """Stands for TensorBoard and W&B, which come before the user's callbacks in the trainer's list."""

    def __init__(self) -> None:
        self.reported: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.reported.append(dict(logs))


def test_memory_and_throughput_are_in_the_history_and_with_the_reporters(model_path: str, tmp_path: Path) -> None:
    first, second = run_distributed(_log_story, model_path, str(tmp_path), **RANKS)
    for reported, history in (first, second):
        steps = [entry for entry in reported if "loss" in entry]
        assert [entry["loss"] for entry in history if "loss" in entry] == [entry["loss"] for entry in steps]
        assert len(steps) == 3
        for index, (entry, kept) in enumerate(zip(steps, [e for e in history if "loss" in e], strict=True)):
            for rank in range(2):
                assert 0.1 < entry[f"memory/host_rss_gib_rank{rank}"] < 20
            tokens = entry["num_tokens"] - (steps[index - 1]["num_tokens"] if index else 0)
            # Two rates of one interval: their ratio is tokens per sample (4 samples a step, rates are rounded).
            ratio = entry["tokens_per_second"] / entry["samples_per_second"]
            assert ratio == pytest.approx(tokens / 4, rel=0.02)
            assert entry.items() <= kept.items()
        assert not any("samples_per_second" in entry for entry in reported if "loss" not in entry)
    assert first[0][0]["memory/host_rss_gib_rank1"] == second[0][0]["memory/host_rss_gib_rank1"]


def _log_story(model_path: str, output_dir: str) -> tuple[list[dict], list[dict]]:
    callbacks = [reporter := _Reporter(), MemoryCallback(), ThroughputCallback()]
    evaluation: dict[str, Any] = dict(eval_strategy="steps", eval_steps=1)
    trainer = make_trainer(model_path, output_dir, callbacks=callbacks, max_steps=3, **evaluation)
    trainer.train()
    return reporter.reported, trainer.state.log_history


def test_throughput_counts_training_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TRL, `include_num_input_tokens_seen` is the count. Times in seconds are given at each event."""
    clock = iter([0.0, 1.0, 11.0, 12.0, 12.0, 12.0, 20.0, 24.0, 25.0, 25.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    callback = ThroughputCallback()
    event: Any = _Counted(step=0, tokens=1000)
    callback.on_train_begin(event.args, event, event)
    callback.on_step_end(event.args, event, event)
    callback.on_evaluate(event.args, event, event)  # 1 to 11
    callback.on_step_end(event.args, event, event)
    values = callback.log_values(_Counted(step=2, tokens=1300), {"loss": 1.0})  # type: ignore[arg-type]
    assert values == {"samples_per_second": 2 * 4 / 2.0, "tokens_per_second": 300 / 2.0}
    callback.on_step_end(event.args, event, event)
    callback.on_evaluate(event.args, event, event)  # 12 to 20
    callback.on_save(event.args, event, event)  # 20 to 24
    callback.on_step_end(event.args, event, event)
    values = callback.log_values(_Counted(step=3, tokens=1300), {"loss": 1.0})  # type: ignore[arg-type]
    assert values == {"samples_per_second": 4 / 1.0}


class _Counted:
    """The parts of TrainerState and TrainingArguments that the callback reads."""

    train_batch_size, gradient_accumulation_steps, world_size, device = 2, 2, 1, "cpu"

    def __init__(self, step: int, tokens: int) -> None:
        self.global_step, self.num_input_tokens_seen, self.args = step, tokens, self


def test_weight_integrity_stops_before_the_first_step_and_during_training(model_path: str, tmp_path: Path) -> None:
    for rows, damaged_at, began_at in run_distributed(_integrity_story, model_path, str(tmp_path), **RANKS):
        assert rows > 0 and began_at == 0
        assert damaged_at == 4, "the check after step 2 passed, the one after step 4 did not"


class _Damage(TrainerCallback):
    """Flips one bit of one row on rank 1 at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == 1:
            flip_one_bit(kwargs["model"])


def flip_one_bit(model: torch.nn.Module) -> None:
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    rows = next(rows for layer in layers if len(rows := layer.weight.detach().to_local()))  # type: ignore[attr-defined]
    rows.view(torch.uint8)[0, 0] ^= 1


def _integrity_story(model_path: str, output_dir: str) -> tuple[int, int, int]:
    """Rows that were compared, and the steps at which training stopped: after damage, and with damage before it."""
    callback = WeightIntegrityCallback(every_n_steps=2)
    with pytest.raises(ConfigError, match="no model to check"):
        callback.check()
    trainer = make_trainer(model_path, output_dir, callbacks=[_Damage(step=3), callback])
    rows = callback.check(trainer.model)
    with pytest.raises(IntegrityError):
        trainer.train()
    damaged_at = trainer.state.global_step
    with pytest.raises(IntegrityError):
        callback.check()
    with pytest.raises(IntegrityError):  # before the first step
        trainer.train()
    return rows, damaged_at, trainer.state.global_step


def test_negative_intervals_between_integrity_checks_are_refused() -> None:
    with pytest.raises(ConfigError, match="every_n_steps"):
        WeightIntegrityCallback(every_n_steps=-1)


def test_interrupted_run_saves_stops_and_resumes_exactly(model_path: str, tmp_path: Path) -> None:
    [whole, _] = run_distributed(train, model_path, str(tmp_path / "whole"), **RANKS, save_strategy="no")
    ranks = run_distributed(_interrupted_story, model_path, str(tmp_path / "part"), **RANKS)
    for result in ranks:
        assert result["status"] == 128 + signal.SIGTERM
        assert result["step"] == 3 and result["restored"]
        assert result["losses"] == whole["losses"][:3]
    assert [path.name for path in (tmp_path / "part").glob("checkpoint-*")] == ["checkpoint-3"]
    resume = str(tmp_path / "part" / "checkpoint-3")
    resumed = run_distributed(train, model_path, str(tmp_path / "part"), **RANKS, resume=resume, save_strategy="no")
    assert resumed[0]["losses"] == whole["losses"]
    final = [load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


class _Signal(TrainerCallback):
    """Sends a signal to one rank in the middle of step 3, as a scheduler would."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # the launcher's copy, within the window


def _interrupted_story(model_path: str, output_dir: str) -> dict[str, Any]:
    before = [signal.getsignal(number) for number in InterruptCallback.SIGNALS]
    callback = InterruptCallback()
    trainer = make_trainer(
        model_path, output_dir, callbacks=[_Signal(), callback], save_strategy="no", eval_strategy="epoch"
    )
    trainer.train()
    restored = [signal.getsignal(number) for number in InterruptCallback.SIGNALS] == before
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)
    assert callback.cut_short
    return {**report(trainer), "status": callback.exit_status, "step": trainer.state.global_step, "restored": restored}


def test_signals_from_the_last_step_on_leave_a_complete_run(model_path: str, tmp_path: Path) -> None:
    """During the last step the ranks still agree on a checkpoint; later they agree when training ends."""
    run_distributed(_late_signals, model_path, str(tmp_path), **RANKS)


class _LateSignal(TrainerCallback):
    """Signals rank 1 alone during the last step, or while its loss is logged."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _late_signals(model_path: str, output_dir: str) -> None:
    for event in ("on_pre_optimizer_step", "on_log"):
        folder, callback = Path(output_dir) / event, InterruptCallback()
        trainer = make_trainer(
            model_path, str(folder), callbacks=[_LateSignal(event), callback], save_strategy="no", max_steps=2,
            logging_steps=2,
        )  # fmt: skip
        trainer.train()
        assert (callback.exit_status, callback.cut_short) == (128 + signal.SIGTERM, False)
        assert (folder / "checkpoint-2").is_dir() == (event != "on_log")
        trainer.save_model()


def test_interrupted_run_keeps_its_checkpoint_when_the_best_one_is_another(model_path: str, tmp_path: Path) -> None:
    """With save_total_limit=1 the Trainer deletes all but the best checkpoint when training ends."""
    run_distributed(_interrupted_with_best, model_path, str(tmp_path), **RANKS)
    assert "checkpoint-3" in {path.name for path in tmp_path.glob("checkpoint-*")}


def _interrupted_with_best(model_path: str, output_dir: str) -> None:
    trainer = make_trainer(
        model_path, output_dir, callbacks=[_Signal(), InterruptCallback()], save_total_limit=1, save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.5, warmup_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert trainer.state.best_global_step in (1, 2), "the last checkpoint is the best: nothing was tested"


def test_second_signal_does_what_it_did_before(monkeypatch: pytest.MonkeyPatch) -> None:
    callback, received = InterruptCallback(), []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        arguments = _Counted(step=0, tokens=0)
        callback.on_train_begin(arguments, arguments, None)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a copy
        assert received == []
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 2 * REPEAT_WINDOW_S)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        # One that no step was left to act on is reported, and does nothing else: other ranks have not got it.
        callback.on_train_end(arguments, arguments, None)  # type: ignore[arg-type]
        assert received == [signal.SIGTERM]
        assert (callback.exit_status, callback.cut_short) == (128 + signal.SIGTERM, False)
    finally:
        signal.signal(signal.SIGTERM, previous)
