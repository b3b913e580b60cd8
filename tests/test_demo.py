"""The parts of `make demo`, and recipes/sft.py from a recipe to an adapter, on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trl import get_peft_config

from hf_fsdp_qlora.callbacks import MemoryCallback
from hf_fsdp_qlora.config import Recipe, load_recipe
from recipes.demo.base_model import EVAL_PASSAGES, SEQUENCE_LENGTH, build_base_model, write_data
from recipes.demo.run import launch_command, peak_memory, read_results
from recipes.demo.stock_eval import stock_eval_loss
from tests.distributed import run_distributed

ROOT = Path(__file__).resolve().parents[1]
# What `accelerate launch --config_file accelerate_configs/cpu_fsdp2.yaml` sets.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder as run.py prepares it, with a base model that was hardly trained."""
    folder = tmp_path_factory.mktemp("demo")
    write_data(folder)
    loss = build_base_model(folder / "base", steps=3)
    assert 0 < loss < 10
    return folder


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_evaluated_passages_are_held_out_and_longer_than_a_sequence(work: Path) -> None:
    from transformers import AutoTokenizer

    train, evaluation = "".join(texts(work / "train.jsonl")), texts(work / "eval.jsonl")
    assert len(evaluation) == EVAL_PASSAGES
    assert len(train) > 3 * len("".join(evaluation))
    seen = set(train.split("\n\n"))
    assert not any(paragraph in seen for passage in evaluation for paragraph in passage.rstrip("\n").split("\n\n"))
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(work / "base")(evaluation)["input_ids"]]
    assert min(lengths) >= SEQUENCE_LENGTH


@pytest.mark.parametrize(("num_gpus", "config", "processes"), [(0, "cpu_fsdp2", 2), (1, "fsdp2", 1), (8, "fsdp2", 2)])
def test_launch_command_uses_the_gpus_that_there_are(num_gpus: int, config: str, processes: int) -> None:
    command = launch_command(num_gpus)
    assert f"accelerate_configs/{config}.yaml" in command
    assert command[command.index("--num_processes") + 1] == str(processes)
    assert ("bfloat16" in command) == (num_gpus > 0)


def test_peak_memory_is_the_most_of_each_rank_on_the_device_that_trained() -> None:
    log = [{"memory/host_rss_gib_rank0": 1.0, "loss": 2.0}, {"memory/host_rss_gib_rank0": 3.0}]
    assert peak_memory(log) == {"peak host memory, rank 0": 3.0}
    log += [{"memory/gpu_peak_gib_rank0": 5.0, "memory/gpu_peak_gib_rank1": 4.0}]
    assert peak_memory(log) == {"peak GPU memory, rank 0": 5.0, "peak GPU memory, rank 1": 4.0}


def train(recipe_path: str) -> int:
    """One rank of `recipes/sft.py`."""
    from recipes.sft import main

    return main(load_recipe(recipe_path))


def test_sft_trains_on_two_processes_and_the_stock_stack_agrees(work: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "recipes/demo/sft.yaml").read_text())
    values |= {
        "model_name_or_path": str(work / "base"),
        "dataset_name": str(work / "train.jsonl"),
        "eval_dataset_name": str(work / "eval.jsonl"),
        "output_dir": str(tmp_path / "adapter"),
        "max_steps": 3,
        "logging_steps": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    statuses = run_distributed(train, str(tmp_path / "recipe.yaml"), env=FSDP2, process_group=False)
    assert statuses == [0, 0]
    results = read_results(tmp_path / "adapter")
    losses = [entry["eval_loss"] for entry in results["log"] if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert results["load"]["quantized_layers"] == 14
    assert results["load"]["local_bytes"] < results["load"]["sharded_bytes"]
    assert len(peak_memory(results["log"])) == 2
    reloaded = stock_eval_loss(
        str(work / "base"), str(tmp_path / "adapter"), str(work / "eval.jsonl"),
        dtype=torch.float32, output_dir=str(tmp_path / "stock"),
    )  # fmt: skip
    # fp32 on both sides; bitsandbytes' CPU kernels round differently from a dequantised matmul.
    assert reloaded == pytest.approx(losses[1], abs=1e-3)


def test_sft_fails_on_every_rank_alike_and_saves_what_a_late_signal_left_complete(work: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "recipes/demo/sft.yaml").read_text())
    values |= {
        "model_name_or_path": str(work / "base"), "dataset_name": str(work / "train.jsonl"),
        "eval_dataset_name": str(work / "eval.jsonl"),
        "output_dir": str(tmp_path / "adapter"), "max_steps": 1, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "adapter" / "load_report.json").mkdir(parents=True)  # rank 0 cannot write the file
    ranks = run_distributed(
        _sft_with_trouble, str(tmp_path / "recipe.yaml"), env=FSDP2, process_group=False, timeout_s=60
    )
    assert "failed on rank 1: OSError: the hub is down" in ranks[0][0] and ranks[1][0] == "the hub is down"
    assert "saving the load report failed on rank 0" in ranks[1][1]
    assert [status for *_, status in ranks] == [128 + signal.SIGTERM] * 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def _sft_with_trouble(recipe_path: str) -> list[Any]:
    """Three runs: rank 1 cannot read the adapter's config, rank 0 cannot write, rank 1 is signalled at the end."""
    from recipes import sft

    recipe, on_rank_1 = load_recipe(recipe_path), os.environ["RANK"] == "1"

    def adapter_config(recipe: Recipe) -> Any:
        if on_rank_1:
            raise OSError("the hub is down")
        return get_peft_config(recipe.model_args)

    class SignalledMemory(MemoryCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            if on_rank_1 and "loss" in kwargs["logs"]:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises((OSError, RuntimeError)) as reading:
        patch.setattr(sft, "adapter_config", adapter_config)
        sft.main(recipe)
    with pytest.raises((OSError, RuntimeError)) as writing:
        sft.main(recipe)
    if not on_rank_1:
        (Path(recipe.training_args.output_dir or "") / "load_report.json").rmdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "MemoryCallback", SignalledMemory)
        return [str(reading.value), str(writing.value), sft.main(recipe)]


def test_sft_script_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("lerning_rate: 1\n")
    command = [sys.executable, str(ROOT / "recipes/sft.py"), "--config", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert "Did you mean 'learning_rate'?" in result.stderr and "Traceback" not in result.stderr
