"""Recipes: keys are checked, values get their field's type, and the command line wins over the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_fsdp_qlora.config import load_recipe, parse_command_line
from hf_fsdp_qlora.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_load_recipe_takes_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "lora_r: 8\nlora_alpha: 64\n")
    recipe = load_recipe(path, {"lora_r": ["4"]})
    assert (recipe.model_args.lora_r, recipe.model_args.lora_alpha, recipe.model_args.lora_dropout) == (4, 64, 0.05)
    assert (recipe.get("lora_r"), recipe.get("lora_dropout"), recipe.get("adapter_dtype")) == (4, 0.05, "float32")
    assert recipe.values == {"lora_r": 4, "lora_alpha": 64}


def test_load_recipe_gives_each_value_its_fields_type(tmp_path: Path) -> None:
    text = """
learning_rate: 2e-4           # a string in YAML 1.1
warmup_steps: 1
packing: yes
lora_target_modules: [q_proj, v_proj]
gradient_checkpointing_kwargs: {use_reentrant: false}
max_length: null
eval_strategy: "no"
report_to: [tensorboard, wandb]
"""
    recipe = load_recipe(write(tmp_path, text), {"no_gradient_checkpointing": [], "dataset_kwargs": ['{"a": 1}']})
    assert dict(recipe.values) == {
        "learning_rate": 2e-4,
        "warmup_steps": 1.0,
        "packing": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "max_length": None,
        "eval_strategy": "no",
        "report_to": ["tensorboard", "wandb"],
        "gradient_checkpointing": False,
        "dataset_kwargs": {"a": 1},
    }


def test_load_recipe_does_not_build_the_training_arguments_of_a_gpu_recipe(tmp_path: Path) -> None:
    # SFTConfig refuses bf16 without a GPU; a recipe must be readable on any machine.
    assert load_recipe(write(tmp_path, "bf16: true\n")).get("bf16") is True


def test_load_recipe_reports_every_problem_with_the_nearest_key(tmp_path: Path) -> None:
    text = "lerning_rate: 1\nlora_r: many\ndtype: int4\neval_strategy: no\nseed: null\nlora_alpha: {a: 1}\n"
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, {"max_steps": ["1", "2"], "packng": []})
    message = str(caught.value)
    assert len(message.splitlines()) == 8
    for part in (
        "unknown key 'lerning_rate'. Did you mean 'learning_rate'?",
        "lora_r='many': invalid int value",
        "dtype='int4': invalid choice",
        "str is needed. Quote the word",
        "seed=None: a value is needed (int)",
        "lora_alpha={'a': 1}: a mapping was got",
        "max_steps=1 2: 2 values were got",
        "Did you mean 'packing'?",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lora_r: 1\nlora_r: 2\n", "sets lora_r more than once"),
        ("- lora_r\n", "must be a flat mapping"),
        ("lora_r: [1\n", "is not YAML"),
    ],
)
def test_load_recipe_refuses_a_file_that_is_no_flat_mapping(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        load_recipe(write(tmp_path, text))


def test_parse_command_line_splits_recipe_and_overrides() -> None:
    words = ["--config", "r.yaml", "--lora-r", "3", "--output_dir=a=b", "--lora_target_modules", "q", "k", "--packing"]
    assert parse_command_line([*words, "--max_steps", "-1"]) == (
        "r.yaml",
        {
            "lora_r": ["3"],
            "output_dir": ["a=b"],
            "lora_target_modules": ["q", "k"],
            "packing": [],
            "max_steps": ["-1"],
        },
    )


@pytest.mark.parametrize("words", [[], ["--lora_r", "3"], ["--config"], ["r.yaml"]])
def test_parse_command_line_needs_a_recipe(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--config RECIPE"):
        parse_command_line(words)


def test_negative_values_reach_their_field(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "{}\n"), {"max_steps": ["-1"]}).values == {"max_steps": -1}
