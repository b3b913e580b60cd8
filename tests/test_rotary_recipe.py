"""Rotary training from a recipe: its keys, and a whole run of recipes/sft.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hf_fsdp_qlora.config import load_recipe
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.rotary.config import RotaryConfig
from hf_fsdp_qlora.rotary_arguments import RotaryArguments
from hf_fsdp_qlora.train import rotary_config
from recipes.sft import main
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import make_tokenizer
from tests.trainer_story import launch


def write_recipe(folder: Path, **values: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "m", "dataset_name": "d", "bf16": False, **values}))
    return path


def test_keys_are_the_fields_of_rotary_config_with_its_defaults() -> None:
    config = {field.name: getattr(RotaryConfig(), field.name) for field in dataclasses.fields(RotaryConfig)}
    keys = {name.removeprefix("rotary_"): value for name, value in vars(RotaryArguments()).items()}
    assert keys.keys() == config.keys() - {"seed"}
    for name, value in keys.items():
        if name != "active":  # which turns it on
            assert value == config[name] or tuple(value) == config[name], name


def test_rotary_config_reads_the_keys_and_the_runs_seed(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rotary_active="2", rotary_keep_bits=8, rotary_always_active=["head"], seed=7)
    expected = RotaryConfig(active="2", keep_bits=8, always_active=("head",), seed=7)
    assert rotary_config(load_recipe(path)) == expected
    assert rotary_config(load_recipe(path, {"rotary_active": None})) is None
    with pytest.raises(ConfigError, match="active='much'"):
        rotary_config(load_recipe(path, {"rotary_active": "much"}))
    with pytest.raises(ConfigError, match="rotary_frozen"):
        load_recipe(path, {"rotary_frozen": "int4"})


@pytest.mark.parametrize("engine", ["one-process", "fsdp2-full"])
def test_sft_script_trains_by_turns_and_writes_a_plain_model(tmp_path: Path, engine: str) -> None:
    model = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    make_tokenizer().save_pretrained(model)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {n} of a text " * 3}) + "\n" for n in range(16)))
    path = write_recipe(
        tmp_path, model_name_or_path=str(model), dataset_name=str(data), eval_dataset_name=str(data), do_eval=True,
        dtype="float32", rotary_active="50%", rotary_steps_per_block=2, max_steps=5, max_length=64, report_to="none",
        per_device_train_batch_size=2, save_strategy="no", output_dir=str(tmp_path / "out"), learning_rate=0.01,
        optim="adamw_torch",
    )  # fmt: skip
    assert launch(engine, _run_sft, str(path)) == [0] * len(launch_ranks(engine))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert trained.keys() == start.keys()
    changed = [name for name in start if not torch.equal(trained[name].float(), start[name].float())]
    assert len(changed) > len(start) / 2
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() and (tmp_path / "out" / "all_results.json").is_file()


def launch_ranks(engine: str) -> range:
    return range(1 if engine == "one-process" else 2)


def _run_sft(path: str) -> int:
    return main(load_recipe(path))
