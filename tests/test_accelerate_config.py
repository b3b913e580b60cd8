"""The wizard: what it writes for six machines validates, and says why."""

from __future__ import annotations

import argparse
import json
import os
import pty
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import LlamaConfig

from hf_fsdp_qlora.accelerate_config import Answers, build_accelerate_config, recommend
from hf_fsdp_qlora.commands import config
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.goals import GOALS
from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.model_shape import model_shape
from hf_fsdp_qlora.validation import ModelFacts, Run, find_problems
from hf_fsdp_qlora.validation_model_rules import memory_fits, memory_settings
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[1]

LLAMA_8B: dict[str, Any] = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192, dtype="bfloat16",
)  # fmt: skip
LLAMA_1B: dict[str, Any] = dict(
    LLAMA_8B, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True
)
LLAMA_70B: dict[str, Any] = dict(
    LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)
OTHERS = sorted({*GOALS} - {"qlora", "rotary"})
MACHINES = {  # GPUs, GiB a card, GiB of host memory
    "1x24": (1, 24, 64), "2x24": (2, 24, 128), "4x16": (4, 16, 128), "8x80": (8, 80, 1024), "cpu": (0, 0, 32),
    "1x141": (1, 141, 256),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with configs of a 1B, an 8B and a 70B model."""
    folders = {}
    for name, sizes in (("1b", LLAMA_1B), ("8b", LLAMA_8B), ("70b", LLAMA_70B)):
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


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("machine", MACHINES)
def test_files_for_a_machine_and_a_goal_validate(
    machine: str, goal: str, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus, memory, host = MACHINES[machine]
    line = ["--yes", "--model", models["8b" if gpus else "1b"], "--gpus", str(gpus), "--gpu-memory", f"{memory}GiB"]
    accelerate, recipe = run_wizard(tmp_path, *line, "--host-memory", f"{host}GiB", "--goal", goal, "--cores", "8")
    assert accelerate["num_processes"] == max(gpus, 2 if gpus == 0 else 1)
    findings = find_problems(tmp_path / "a.yaml", tmp_path / "r.yaml", gpu_memory_bytes=memory * 2**30 or None)
    assert findings.problems == [] and len(findings.not_checked) == (gpus == 0)  # a CPU has no card to fit
    load_config_from_file(str(tmp_path / "a.yaml"))  # accelerate's own reader takes it
    assert GOALS[goal].recipe.items() <= recipe.items()
    batch = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    assert gpus == 0 or batch * gpus == 16
    printed = capsys.readouterr().out
    files = f"hf-fsdp-qlora train --accelerate_config {tmp_path / 'a.yaml'} --config {tmp_path / 'r.yaml'}"
    assert (f"OMP_NUM_THREADS=4 {files}" if gpus == 0 else f"\n{files}") in printed
    assert (tmp_path / "r.yaml").read_text().startswith(f"# {printed.splitlines()[0]}")


@pytest.mark.parametrize("gpus", [0, 1])
def test_printed_command_survives_a_shell_whatever_the_files_are_called(
    gpus: int, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my $HOME; it's"
    line = ["--yes", "--model", models["1b"], "--gpus", str(gpus), "--gpu-memory", "24GiB", "--host-memory", "64GiB"]
    run_wizard(folder, *line)
    command = capsys.readouterr().out.strip().splitlines()[-1]
    stand_in = tmp_path / "hf-fsdp-qlora"
    stand_in.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    stand_in.chmod(0o755)
    env = {"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
    shown = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True, check=True)
    files = ["--accelerate_config", str(folder / "a.yaml"), "--config", str(folder / "r.yaml")]
    assert shown.stdout.splitlines() == ["train", *files]


@pytest.mark.parametrize("goal", GOALS)
def test_validate_predicts_the_memory_that_the_wizard_planned_with(goal: str, models: dict[str, str]) -> None:
    shape = model_shape(models["8b"])
    for gpus, memory in ((1, 24), (2, 24), (4, 16)):
        answers = Answers("m", "d", gpus=gpus, gpu_memory_gib=memory, host_memory_gib=256, goal=goal)
        found = recommend(answers, shape)
        run = Run(found.accelerate, found.recipe, ModelFacts("m", frozenset(), "bfloat16", shape))
        estimate = estimate_memory(shape, memory_settings(run))
        assert estimate.peak_bytes == found.peak_bytes
        too_small = replace(run, gpu_memory_bytes=estimate.needed_bytes - 1)
        assert memory_fits(too_small) is not None
        assert memory_fits(replace(run, gpu_memory_bytes=estimate.needed_bytes)) is None


def test_validate_says_which_memory_it_cannot_predict(models: dict[str, str]) -> None:
    accelerate = build_accelerate_config("none", num_processes=1, offload="none", use_cpu=False)
    base = {"model_name_or_path": models["8b"], "dtype": "bfloat16"}
    for keys, unknown in (
        ({"use_peft": True, "optim": "adalomo"}, "optim=adalomo"),
        ({"use_peft": True, "checkpoint_layers": 4}, "checkpoint_layers=4"),
        ({"use_peft": True, "hqq_nbits": 3}, "not this format"),
        ({"rotary_active": "2GiB"}, "not as 2GiB"),
    ):
        findings = find_problems(accelerate, {**base, **keys}, gpu_memory_bytes=24 * 2**30)
        assert len(findings.not_checked) == 1 and unknown in findings.not_checked[0]


@pytest.mark.parametrize("goal", ["qlora", "rotary", *(pytest.param(goal, marks=pytest.mark.slow) for goal in OTHERS)])
def test_files_for_this_machines_cpu_train_as_they_are(goal: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", dtype=torch.float32)
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = (json.dumps({"text": f"{number} is followed by {number + 1}"}) + "\n" for number in range(4))
    (tmp_path / "data.jsonl").write_text("".join(rows))
    line = ["--yes", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "data.jsonl"), "--gpus", "0"]
    run_wizard(tmp_path, *line, "--goal", goal, "--output-dir", str(tmp_path / "out"))
    command = [sys.executable, "-m", "hf_fsdp_qlora.cli", "train", "--accelerate_config", str(tmp_path / "a.yaml")]
    result = subprocess.run(
        [*command, "--config", str(tmp_path / "r.yaml")],
        capture_output=True, text=True, cwd=ROOT, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # four samples, two processes, one each at a time
    report = json.loads((tmp_path / "out" / "load_report.json").read_text())
    assert report["quantized_layers"] == (0 if goal == "lora" else 14)
    assert report["local_bytes"] < report["quantized_bytes"] + report["frozen_bytes"] + report["trainable_bytes"]
    weights = "adapter_model.safetensors" if GOALS[goal].has_adapter else "model.safetensors"
    assert (tmp_path / "out" / weights).is_file()


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
    assert chosen(large, 2, 24, seq_len=512) == ("FSDP", "none")
    whole = Answers(gpus=2, gpu_memory_gib=24, host_memory_gib=64, seq_len=512, **base)
    assert recommend(whole, large).recipe.items() >= {"replicate_head": True, "embedding_on_host": True}.items()
    assert chosen(large, 8, 80) == ("MULTI_GPU", "none")
    assert chosen(large, 8, 80, goal="lora") == ("FSDP", "none")
    with pytest.raises(ConfigError, match="host memory"):
        chosen(large, 2, 24, host=16)
    with pytest.raises(ConfigError, match="fits in no way"):
        chosen(large, 1, 4)
    with pytest.raises(ConfigError, match="host memory"):
        chosen(large, 0, 0, host=32)
    with pytest.raises(ConfigError, match="no memory of a card"):
        chosen(small, 2, 0)
    with pytest.raises(ConfigError, match="positions"):
        chosen(small, 1, 24, seq_len=100_000)


def test_wizard_compiles_layers_where_that_pays(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what a machine is said to have: nothing is compiled here."""

    def written(machine: str, *, goal: str = "qlora", model: str = "8b") -> tuple[dict[str, Any], str]:
        gpus, memory, host = MACHINES[machine]
        line = ["--gpus", str(gpus), "--gpu-memory", f"{memory}GiB", "--host-memory", f"{host}GiB", "--goal", goal]
        _, recipe = run_wizard(tmp_path, "--yes", "--overwrite", "--model", models[model], *line)
        return recipe, capsys.readouterr().out

    keys = {"compile_layers", "activation_budget"}
    for machine, goal, batch_size, budget in (
        ("1x24", "qlora", 4, 0.3), ("1x24", "hqq", 4, 0.3), ("1x24", "lora", 4, 0.0), ("2x24", "qlora", 4, 0.3),
        ("1x141", "qlora", 8, 1.0),
    ):  # fmt: skip
        recipe, said = written(machine, goal=goal)
        chosen = dict(compile_layers=True, activation_budget=budget, per_device_train_batch_size=batch_size)
        assert recipe.items() >= {**chosen, "gradient_checkpointing": True, "lora_dropout": 0.0}.items()
        assert "Layers are compiled" in said and f"activation_budget {budget:g}: of what" in said
    for machine, goal, model in (("cpu", "qlora", "1b"), ("1x24", "rotary", "8b"), ("2x24", "qlora", "70b")):
        recipe, said = written(machine, goal=goal, model=model)
        assert not keys & recipe.keys() and "ompiled" not in said


def test_wizard_asks_for_what_is_missing_and_again_for_what_makes_no_sense(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "Model": ["no/such/folder", models["8b"]], "GPUs": ["two", "2"], "Memory of one": ["24 apples", "24"],
        "Tokens": ["1024"], "Goal": ["fame", "lora"],
    }  # fmt: skip
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        waiting = next((answers for key, answers in given.items() if question.startswith(key)), [])
        return waiting.pop(0) if waiting else ""

    accelerate, recipe = run_wizard(tmp_path, "--host-memory", "128GiB", ask=ask)
    assert (accelerate["num_processes"], recipe["max_length"], recipe["load_in_4bit"]) == (2, 1024, False)
    assert recipe["dataset_name"] == config.DEFAULT_DATASET
    assert not any("Memory of this machine" in question for question in asked)
    printed = capsys.readouterr().out
    for problem in ("'no/such/folder' cannot be read", "gpus='two'", "'24 apples' is no memory size", "goal='fame'"):
        assert problem in printed


def test_wizard_takes_arrow_keys_on_a_terminal(models: dict[str, str], tmp_path: Path) -> None:
    """accelerate's menu, in a terminal of its own: arrow down twice, enter."""
    line = ["--model", models["8b"], "--dataset", "d", "--gpus", "1", "--gpu-memory", "80", "--host-memory", "128"]
    line += ["--cores", "8", "--seq-len", "512"]
    files = ["--accelerate-config", str(tmp_path / "a.yaml"), "--recipe", str(tmp_path / "r.yaml")]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_fsdp_qlora.cli", "config", *line, *files],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
    )  # fmt: skip
    down, enter, lit = b"\x1b[B", b"\r", b"\x1b[32m"
    hidden_cursor = b"\x1b[?25l"
    for key, before in ((down, hidden_cursor), (down, lit + b"HQQ"), (enter, lit + b"LoRA")):
        shown = b""
        while before not in shown:
            shown += os.read(ours, 1000)
        while termios.tcgetattr(theirs)[3] & termios.ICANON:  # what is typed before it listens is discarded
            time.sleep(0.05)
        os.write(ours, key)
    assert process.wait(timeout=60) == 0
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["load_in_4bit"] is False


def test_wizard_does_not_replace_files_or_guess_a_model(models: dict[str, str], tmp_path: Path) -> None:
    line = ["--yes", "--model", models["1b"], "--gpus", "0", "--host-memory", "32GiB"]
    run_wizard(tmp_path, *line)
    with pytest.raises(ConfigError, match="exists"):
        run_wizard(tmp_path, *line)
    run_wizard(tmp_path, *line, "--overwrite")
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="--model"):
        run_wizard(tmp_path / "b", "--yes", "--gpus", "0")

    def no_more(question: str) -> str:
        raise EOFError

    with pytest.raises(ConfigError, match="--yes"):
        run_wizard(tmp_path / "b", ask=no_more)
