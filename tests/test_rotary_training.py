"""Rotary training through the stock SFTTrainer: equal to stock full fine-tuning where both do the same, and equal to
itself on one process, under DDP and under FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_fsdp_qlora.loading import load_model
from hf_fsdp_qlora.rotary.config import RotaryConfig
from tests.distributed import run_distributed
from tests.rotary_story import losses, make_rotary_trainer, train_rotary, train_stock
from tests.test_hsdp import hsdp
from tests.tiny_models import save_tiny_model
from tests.trainer_story import launch

EVALUATED: dict[str, Any] = dict(eval_strategy="steps", eval_steps=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four layers, so that something is below and above what is active; stored in float32."""
    path = tmp_path_factory.mktemp("model")
    return str(save_tiny_model(path, dtype=torch.float32, num_hidden_layers=4))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tied embeddings and biases."""
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen2", dtype=torch.float32))


def assert_same_run(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("losses", "grad_norms", "learning_rates", "eval_losses"):
        assert actual[key] == expected[key], key
    for name, weight in actual["weights"].items():
        assert torch.equal(weight, expected["weights"][name]), name


@pytest.mark.parametrize("frozen", ["bf16", "int8"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_all_blocks_active_equal_stock_adamw_bit_for_bit(
    llama: str, tmp_path: Path, frozen: str, checkpointing: bool
) -> None:
    """float32, one process: accumulation, clipping at every step, weight decay groups, warm-up, evaluation."""
    run: dict[str, Any] = dict(gradient_checkpointing=checkpointing, **EVALUATED)
    expected = train_stock(llama, str(tmp_path), **run)
    assert min(expected["grad_norms"]) > 0.1, "clipping did not happen at every step"
    assert_same_run(train_rotary(llama, str(tmp_path), rotary={"frozen": frozen}, **run), expected)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_tied_embeddings_and_biases_equal_stock_bit_for_bit(qwen2: str, tmp_path: Path, optim: str) -> None:
    expected = train_stock(qwen2, str(tmp_path), optim=optim)
    assert_same_run(train_rotary(qwen2, str(tmp_path), rotary={"frozen": "int8"}, optim=optim), expected)


def test_bf16_autocast_over_float32_weights_equals_stock_bit_for_bit(llama: str, tmp_path: Path) -> None:
    expected = train_stock(llama, str(tmp_path), bf16=True)
    assert_same_run(train_rotary(llama, str(tmp_path), rotary={"frozen": "int8"}, bf16=True), expected)


@pytest.mark.parametrize("name", ["ddp", "fsdp2-full"])
def test_all_blocks_active_on_two_ranks_agree_with_stock_adamw(llama: str, tmp_path: Path, name: str) -> None:
    """Only the order of float32 sums differs."""
    expected = train_stock(llama, str(tmp_path), **EVALUATED)
    ranks = launch(name, train_rotary, llama, str(tmp_path), rotary={"frozen": "int8"}, **EVALUATED)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    for key in ("losses", "grad_norms", "eval_losses"):
        assert ranks[0][key] == pytest.approx(expected[key], rel=1e-6), key
    for rank in ranks:
        for weight_name, weight in rank["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][weight_name], rtol=0, atol=2e-6)


def loaded(path: str) -> dict[str, torch.Tensor]:
    return load_file(Path(path) / "model.safetensors")


def relative_error(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: Any) -> float:
    """L2 norm of the difference over that of the update, all parameters together."""
    error = sum(float((weights[name] - weight).square().sum()) for name, weight in expected.items())
    update = sum(float((weight - start[name]).square().sum()) for name, weight in expected.items())
    return (error / update) ** 0.5


ROTATING: dict[str, Any] = dict(active=1, steps_per_block=2, frozen="int8", order="random", seed=3)


@pytest.mark.parametrize(
    "changes", [{}, {"frozen": "nf4", "split": "attention_mlp"}, {"frozen": "bf16", "order": "importance"}]
)
def test_rotating_runs_agree_on_one_process_ddp_and_fsdp2(llama: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    """More than a sweep. Adam's first steps go by the sign of a gradient, so that an element whose gradient is all
    rounding can go either way: what is compared is the whole update, whose relative error was at most 1.4e-4."""
    rotary = {**ROTATING, **changes}
    run: dict[str, Any] = dict(max_steps=14, rotary=rotary, **EVALUATED)
    [one] = launch("one-process", train_rotary, llama, str(tmp_path), **run)
    assert len({entry["rotary/lowest_active_block"] for entry in one["logs"] if "loss" in entry}) > 3
    for name in ("ddp", "fsdp2-full"):
        ranks = launch(name, train_rotary, llama, str(tmp_path), **run)
        assert ranks[0]["losses"] == ranks[1]["losses"]
        for key in ("losses", "eval_losses"):
            assert ranks[0][key] == pytest.approx(one[key], rel=1e-5), (name, key)
        assert relative_error(ranks[1]["weights"], one["weights"], loaded(llama)) < 1e-3, name


@pytest.mark.parametrize("name", ["one-process", "ddp", "fsdp2-full"])
def test_an_evaluation_before_training_changes_nothing(llama: str, tmp_path: Path, name: str) -> None:
    """All is parked then, and accelerate prepares the model for evaluation first."""
    expected = launch(name, train_rotary, llama, str(tmp_path), rotary=ROTATING)
    actual = launch(name, _evaluate_then_train, llama, str(tmp_path))
    assert [rank["losses"] for rank in actual] == [rank["losses"] for rank in expected]
    start, end = actual[0]["eval_losses"]
    assert start > 5 and end < start


def _evaluate_then_train(model_path: str, output_dir: str) -> dict[str, list[float]]:
    trainer, _ = make_rotary_trainer(model_path, output_dir, rotary=ROTATING)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return {**losses(trainer), "eval_losses": [before, trainer.evaluate()["eval_loss"]]}


@pytest.mark.parametrize("name", ["one-process", "ddp"])
@pytest.mark.parametrize("frozen", ["int8", "bf16"])
def test_without_fsdp_the_format_is_all_that_load_model_must_know(
    llama: str, tmp_path: Path, name: str, frozen: str
) -> None:
    rotary = {**ROTATING, "frozen": frozen}
    expected = launch(name, train_rotary, llama, str(tmp_path), rotary=rotary)
    actual = launch(name, train_rotary, llama, str(tmp_path), rotary=rotary, by_format=True)
    for rank, other in zip(actual, expected, strict=True):
        assert_same_run(rank, other)


def test_fsdp2_shards_what_is_parked_unquantised(llama: str) -> None:
    """float32 weights in whole rows of 8192 and four bytes."""
    for report in launch("fsdp2-full", _report_of_unquantised, llama):
        linears = sum(weight.nbytes for name, weight in loaded(llama).items() if "_proj" in name)
        assert report.quantized_layers == 28 and report.sharded_bytes == report.quantized_bytes
        assert linears < report.quantized_bytes < linears + 28 * 4 * 8193


def _report_of_unquantised(model_path: str) -> Any:
    model: Any = load_model(model_path, rotary=RotaryConfig(frozen="bf16"), dtype=torch.float32)
    return model.load_report


def test_two_replicas_of_two_ranks_agree_with_one_process(llama: str, tmp_path: Path) -> None:
    """HSDP: rows are split inside a replica, masters and the work of the optimizer over all four ranks."""
    run: dict[str, Any] = dict(max_steps=4, rotary=ROTATING)
    [one] = launch("one-process", train_rotary, llama, str(tmp_path), per_device_train_batch_size=4, **run)
    ranks = run_distributed(
        train_rotary, llama, str(tmp_path), per_device_train_batch_size=1, world_size=4, env=hsdp(2, 2),
        process_group=False, **run,
    )  # fmt: skip
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert relative_error(rank["weights"], one["weights"], loaded(llama)) < 1e-3
