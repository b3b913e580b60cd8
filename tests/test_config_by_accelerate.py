"""A file that accelerate's own `accelerate config` writes is accepted wherever ours is.

The files are made by accelerate's questionnaire itself, with its defaults where nothing is said.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config import cluster
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import LlamaConfig

from hf_fsdp_qlora.commands import train as train_command
from hf_fsdp_qlora.commands import validate as validate_command
from hf_fsdp_qlora.validation import find_problems
from tests.distributed import run_distributed
from tests.tiny_models import make_config, save_tiny_model
from tests.trainer_story import launch, train

GPUS = {"type of machine": "multi-GPU", "How many GPU": 2}
FSDP = {**GPUS, "use FullyShardedDataParallel": True}
TWO_MACHINES = {
    "How many different machines": 2, "rank of this machine": 0, "IP address": "10.0.0.1", "port": 29500,
    "use the parallelism config": True, "data parallelism replicate": 2, "FSDP shard": 2, "How many GPU": 4,
}  # fmt: skip
# name -> answers by a part of the question; accelerate's default elsewhere
ANSWERS: dict[str, dict[str, Any]] = {
    "one GPU": {"type of machine": "No distributed training"},
    "ddp": GPUS,
    "fsdp1": {**FSDP, "FSDP version": 1, "_no_split_modules": True},
    "fsdp2": {**FSDP, "FSDP version": 2, "_no_split_modules": True},
    "fsdp2, named layer": {**FSDP, "FSDP version": 2, "_no_split_modules": False, "class name": "LlamaDecoderLayer"},
    "fsdp2, no wrap": {**FSDP, "FSDP version": 2, "auto wrap policy": "NO_WRAP"},
    "fsdp2, offload": {**FSDP, "FSDP version": 2, "_no_split_modules": True, "offload parameters": True},
    "two machines": {**FSDP, "FSDP version": 2, "_no_split_modules": True, **TWO_MACHINES},
}
RECIPE = dict(use_peft=True, load_in_4bit=True, dtype="bfloat16", bf16=True, max_length=64)


@pytest.fixture
def write_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Have accelerate write the file of a name in ANSWERS."""

    def write(name: str) -> Path:
        answers = dict(ANSWERS[name])

        def said(question: str, default: Any) -> Any:
            return next((answer for part, answer in answers.items() if part in question), default)

        def ask_field(question: str, convert: Any = None, default: Any = None, error_message: str = "") -> Any:
            return said(question, default)

        def ask_options(question: str, options: list[Any], convert: Any = None, default: int = 0) -> Any:
            chosen = options.index(said(question, options[default]))
            return convert(chosen) if convert is not None else chosen

        monkeypatch.setattr(cluster, "_ask_field", ask_field)
        monkeypatch.setattr(cluster, "_ask_options", ask_options)
        path = tmp_path / "default_config.yaml"
        cluster.get_cluster_input().to_yaml_file(str(path))
        return path

    return write


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose model's config is there, without weights."""
    folder = tmp_path_factory.mktemp("recipe")
    config = make_config("llama")
    assert isinstance(config, LlamaConfig)
    config.save_pretrained(folder / "model")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "model_name_or_path": str(folder / "model"), "dataset_name": "data"}))
    return path


@pytest.mark.parametrize("name", ANSWERS)
def test_validate_and_train_accept_it(
    name: str, write_config: Callable[[str], Path], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(name)
    assert find_problems(path, recipe).problems == []
    parser = argparse.ArgumentParser()
    validate_command.register(parser.add_subparsers())
    line = ["validate", "--accelerate_config", str(path), "--config", str(recipe)]
    assert validate_command.run(parser.parse_args(line)) == 0
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command))
    train_command.run(argparse.Namespace(config=str(recipe), accelerate_config=str(path), num_processes=None, rest=[]))
    assert str(path) in started[0]


def test_the_questionnaire_asked_what_the_answers_are_for(write_config: Callable[[str], Path]) -> None:
    """Else the files above would be defaults."""
    values = yaml.safe_load(write_config("two machines").read_text())
    assert (values["distributed_type"], values["num_machines"], values["num_processes"]) == ("FSDP", 2, 4)
    assert values["fsdp_config"]["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert values["parallelism_config"]["parallelism_config_dp_replicate_size"] == 2
    assert values["parallelism_config"]["parallelism_config_dp_shard_size"] == 2
    named = yaml.safe_load(write_config("fsdp2, named layer").read_text())["fsdp_config"]
    assert named["fsdp_transformer_layer_cls_to_wrap"] == "LlamaDecoderLayer"


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2, named layer"])
def test_stock_training_runs_with_its_environment(
    name: str, write_config: Callable[[str], Path], tmp_path: Path
) -> None:
    """What `accelerate launch` makes of the file, on two gloo ranks, with the default TRANSFORMER_BASED_WRAP and
    SHARDED_STATE_DICT. The reference is one process."""
    line = ["--config_file", str(write_config(name)), "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    env = {key: value for key, value in prepare_multi_gpu_env(args).items() if key.startswith(("FSDP_", "ACCELERATE"))}
    assert env["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    model = str(save_tiny_model(tmp_path / "model", dtype=torch.float32))
    [expected] = launch("one-process", train, model, str(tmp_path / "one"), max_steps=2)
    ranks = run_distributed(train, model, str(tmp_path / "two"), max_steps=2, env=env, process_group=False)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert (tmp_path / "two" / "final" / "adapter_model.safetensors").is_file()
