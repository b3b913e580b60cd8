"""The wizard: what it writes for six machines validates, and says why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import LlamaConfig

from hf_fsdp_qlora.accelerate_config import Answers, recommend
from hf_fsdp_qlora.commands import config
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.model_shape import model_shape
from hf_fsdp_qlora.validation import find_problems

LLAMA_8B: dict[str, Any] = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192, dtype="bfloat16",
)  # fmt: skip
LLAMA_70B: dict[str, Any] = dict(
    LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)
MACHINES = {  # GPUs, GiB a card, GiB of host memory
    "1x24": (1, 24, 64), "2x24": (2, 24, 128), "4x16": (4, 16, 128), "8x80": (8, 80, 1024), "cpu": (0, 0, 32),
    "1x141": (1, 141, 256),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with configs of an 8B and a 70B model."""
    folders = {}
    for name, sizes in (("8b", LLAMA_8B), ("70b", LLAMA_70B)):
        folders[name] = str(tmp_path_factory.mktemp(name))
        LlamaConfig(**sizes).save_pretrained(folders[name])
    return folders


def run_wizard(folder: Path, *line: str, ask: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    parser = argparse.ArgumentParser()
    config.register(parser.add_subparsers())
    files = ["--accelerate-config", str(folder / "a.yaml"), "--recipe", str(folder / "r.yaml")]
    args = parser.parse_args(["config", *line, *files])
    assert (config.run(args, ask) if ask else config.run(args)) == 0
    return yaml.safe_load((folder / "a.yaml").read_text()), yaml.safe_load((folder / "r.yaml").read_text())


@pytest.mark.parametrize("machine", MACHINES)
def test_files_for_a_machine_validate(machine: str, models: dict[str, str], tmp_path: Path, capsys) -> None:
    gpus, memory, host = MACHINES[machine]
    line = ["--yes", "--model", models["8b"], "--gpus", str(gpus), "--gpu-memory", f"{memory}GiB"]
    accelerate, recipe = run_wizard(tmp_path, *line, "--host-memory", f"{host}GiB")
    assert accelerate["num_processes"] == max(gpus, 2 if gpus == 0 else 1)
    findings = find_problems(tmp_path / "a.yaml", tmp_path / "r.yaml", gpu_memory_bytes=memory * 2**30 or None)
    assert findings.problems == []
    load_config_from_file(str(tmp_path / "a.yaml"))  # accelerate's own reader takes it
    batch = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    assert gpus == 0 or batch * gpus == 16
    assert "accelerate launch" in capsys.readouterr().out


def test_choice_of_engine_and_offload(models: dict[str, str]) -> None:
    small, large = model_shape(models["8b"]), model_shape(models["70b"])
    base: dict[str, Any] = dict(model="m", dataset="d")

    def chosen(shape: Any, gpus: int, memory: float, host: float = 512, **more: Any) -> tuple[str, Any]:
        answers = Answers(gpus=gpus, gpu_memory_gib=memory, host_memory_gib=host, **base, **more)
        found = recommend(answers, shape)
        fsdp = found.accelerate.get("fsdp_config", {})
        offload = found.recipe.get("offload") or ("all" if fsdp.get("fsdp_offload_params") else "none")
        return found.accelerate["distributed_type"], offload

    assert chosen(small, 1, 24) == ("NO", "none")
    assert chosen(small, 2, 24) == ("MULTI_GPU", "none")
    assert chosen(large, 2, 40) == ("FSDP", "none")
    assert chosen(large, 2, 24) == ("FSDP", "base")
    assert chosen(large, 8, 80) == ("MULTI_GPU", "none")
    assert chosen(large, 8, 80, goal="lora") == ("FSDP", "none")
    with pytest.raises(ConfigError, match="host memory"):
        chosen(large, 2, 24, host=16)
    with pytest.raises(ConfigError, match="fits in no way"):
        chosen(large, 1, 4)
    with pytest.raises(ConfigError, match="positions"):
        chosen(small, 1, 24, seq_len=100_000)


def test_wizard_asks_for_what_is_missing(models: dict[str, str], tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return {"Model": models["8b"], "GPUs": "2", "Memory of one": "24", "Tokens": "1024"}.get(
            next((key for key in ("Model", "GPUs", "Memory of one", "Tokens") if question.startswith(key)), ""), ""
        )

    accelerate, recipe = run_wizard(tmp_path, "--host-memory", "128GiB", ask=ask)
    assert (accelerate["num_processes"], recipe["max_length"]) == (2, 1024)
    assert recipe["dataset_name"] == config.DEFAULT_DATASET
    assert not any("Memory of this machine" in question for question in asked)


def test_wizard_does_not_replace_files_or_guess_a_model(models: dict[str, str], tmp_path: Path) -> None:
    line = ["--yes", "--model", models["8b"], "--gpus", "0"]
    run_wizard(tmp_path, *line)
    with pytest.raises(ConfigError, match="exists"):
        run_wizard(tmp_path, *line)
    run_wizard(tmp_path, *line, "--overwrite")
    with pytest.raises(ConfigError, match="--model"):
        run_wizard(tmp_path, "--yes", "--gpus", "0")
