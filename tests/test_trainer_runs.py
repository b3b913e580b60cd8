"""Whole runs of the stock SFTTrainer: long enough for rounding to add up, on masked data, and with a full disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import make_tokenizer
from tests.trainer_story import adapter, assert_equal, launch, make_trainer, train


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.float32))


def test_twenty_steps_agree_with_one_process_and_resume_exactly(model_path: str, tmp_path: Path) -> None:
    """fp32, accumulation 2, clipping and gradient checkpointing. What differs is the order of float32 sums:
    1.7e-7 relative in the losses and 1.3e-7 in the adapters were seen."""
    run: dict[str, Any] = dict(max_steps=20, save_steps=10, learning_rate=1e-3)
    [whole, _] = launch("fsdp2-full", train, model_path, str(tmp_path / "two"), **run)
    [expected] = launch("one-process", train, model_path, str(tmp_path / "one"), **run)
    assert len(whole["losses"]) == 20 and whole["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert min(expected["grad_norms"]) > 0.1, "clipping did not happen at every step"
    two, one = adapter(tmp_path / "two" / "final"), adapter(tmp_path / "one" / "final")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=2e-6, msg=key)
    resume = str(tmp_path / "two" / "checkpoint-10")
    [resumed, _] = launch("fsdp2-full", train, model_path, str(tmp_path / "again"), resume=resume, **run)
    assert resumed["losses"] == whole["losses"]
    assert_equal(adapter(tmp_path / "again" / "final"), two)


@pytest.mark.parametrize("name", ["fsdp2-full", "fsdp2-sharded", "ddp"])
def test_failing_write_on_one_rank_stops_every_rank(name: str, model_path: str, tmp_path: Path) -> None:
    ranks = launch(name, _failing_writes, model_path, str(tmp_path), timeout_s=60)
    assert [calls for calls, *_ in ranks] == [1, 0], "only the writing rank may call _save"
    assert "failed on rank 0: OSError: No space left" in ranks[1][1]
    if name != "fsdp2-sharded":  # torch.distributed.checkpoint writes it there
        assert "saving the optimizer state to" in ranks[1][2] and "failed on rank 0" in ranks[1][2]


def _failing_writes(model_path: str, output_dir: str) -> list[Any]:
    trainer = make_trainer(model_path, output_dir, max_steps=1, save_steps=1)
    stock, calls = trainer._save, []

    def save(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if trainer.args.should_save:
            raise OSError("No space left on device")

    trainer._save = save  # type: ignore[method-assign]
    with pytest.raises((OSError, RuntimeError)) as model_error:
        trainer.train()
    trainer._save = stock  # type: ignore[method-assign]
    for file in ("optimizer.bin", "optimizer.pt"):  # a folder is where the file should be
        (Path(output_dir) / "checkpoint-1" / file).mkdir(parents=True, exist_ok=True)
    if trainer.is_fsdp_enabled and "FULL" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        return [len(calls), str(model_error.value)]
    with pytest.raises((OSError, RuntimeError)) as optimizer_error:
        trainer.train()
    return [len(calls), str(model_error.value), str(optimizer_error.value)]


def test_chat_and_completion_data_train_on_their_answers_alone(model_path: str, tmp_path: Path) -> None:
    [expected] = launch("one-process", _masked_stories, model_path, str(tmp_path / "one"))
    for losses in launch("fsdp2-full", _masked_stories, model_path, str(tmp_path / "two")):
        assert losses == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 4 and all(math.isfinite(loss) for loss in expected)


def _masked_stories(model_path: str, output_dir: str) -> list[float]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    )
    pairs = [("question " + "?" * index, "answer " + "!" * (2 * index + 1)) for index in range(8)]
    turns = [[{"role": "user", "content": ask}, {"role": "assistant", "content": say}] for ask, say in pairs]
    run: dict[str, Any] = dict(tokenizer=tokenizer, max_steps=2, save_strategy="no")
    chat = Dataset.from_list([{"messages": messages} for messages in turns])
    completions = Dataset.from_list([{"prompt": ask, "completion": say} for ask, say in pairs])
    losses = train(model_path, output_dir, data=chat, assistant_only_loss=True, **run)["losses"]
    return losses + train(model_path, output_dir, data=completions, **run)["losses"]
