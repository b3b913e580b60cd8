"""Every rule of validate: one pair of configs that trips it and one that does not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, LlamaConfig, T5Config

from hf_fsdp_qlora.config import recipe_fields
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.resources import accelerate_config_names, find_accelerate_config
from hf_fsdp_qlora.validation import DEFAULTS, find_problems, validate
from hf_fsdp_qlora.validation_model_rules import MODEL_RULES, memory_fits
from hf_fsdp_qlora.validation_rules import BITSANDBYTES_OPTIMIZERS, RULES
from tests.distributed import run_distributed
from tests.tiny_models import save_tiny_model
from tests.trainer_story import launch, train
from tests.validation_cases import CASES, FSDP2, RECIPE, fsdp2, recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of a 1B model: no weights."""
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def rules_tripped(pair: tuple[dict, dict], model: str) -> set[str]:
    accelerate, values = pair
    found = find_problems(accelerate, {**values, "model_name_or_path": model}, gpu_memory_bytes=8 * 2**30)
    return {problem.rule for problem in found.problems}


def test_every_rule_has_its_cases() -> None:
    assert {rule.__name__ for rule in (*RULES, *MODEL_RULES, memory_fits)} == CASES.keys()


def test_the_plain_pair_trips_nothing(model: str) -> None:
    assert rules_tripped((FSDP2, RECIPE), model) == set()


@pytest.mark.parametrize("rule", CASES)
def test_rule_is_tripped(rule: str, model: str) -> None:
    for pair in CASES[rule][0]:
        assert rule in rules_tripped(pair, model), pair


@pytest.mark.parametrize("rule", CASES)
def test_rule_is_not_tripped(rule: str, model: str) -> None:
    for pair in CASES[rule][1]:
        assert rule not in rules_tripped(pair, model), pair


def test_a_tied_head_is_not_kept_whole(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=512, tie_word_embeddings=True).save_pretrained(
        tmp_path
    )
    tripped = rules_tripped((FSDP2, recipe(replicate_head=True)), str(tmp_path))
    assert "whole_parameters_are_frozen" in tripped


def test_defaults_equal_upstreams() -> None:
    fields = recipe_fields()
    for key, value in DEFAULTS.items():
        assert fields[key].default == value, key


def test_validate_reports_everything_at_once_with_reason_and_fix() -> None:
    bad = fsdp2(fsdp_activation_checkpointing=True, fsdp_state_dict_type="LOCAL_STATE_DICT")
    with pytest.raises(ConfigError) as caught:
        validate(bad, recipe(optim="adamw_8bit", bnb_4bit_quant_storage="bfloat16"))
    text = str(caught.value)
    for part in ("fsdp_activation_checkpointing", "LOCAL_STATE_DICT", "adamw_8bit", "bnb_4bit_quant_storage"):
        assert part in text
    assert text.count("why:") == text.count("fix:") == 4


def test_config_of_another_kind_of_model_is_no_crash(tmp_path: Path) -> None:
    """load_model says what such a model is; `validate` must get as far as the other rules."""
    T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=64).save_pretrained(tmp_path)
    found = find_problems(FSDP2, recipe(model_name_or_path=str(tmp_path), load_in_8bit=True))
    assert "weights_have_a_row_format" in {problem.rule for problem in found.problems}
    assert "no causal language model" in found.not_checked[0]


def test_revision_of_the_model_is_the_one_that_is_checked(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    stock = AutoConfig.from_pretrained

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append(options["revision"])
        return stock(name, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    for values in (RECIPE, recipe(model_revision="v2")):
        find_problems(FSDP2, {**values, "model_name_or_path": model})
    assert asked == ["main", "v2"]


def test_validate_says_what_it_could_not_check() -> None:
    notes = validate(FSDP2, recipe(model_name_or_path="nobody/has-this-model"))
    assert len(notes) == 1
    assert "targets match" in notes[0]
    assert "not on this machine" in notes[0]


@pytest.mark.parametrize("name", accelerate_config_names())
def test_shipped_accelerate_configs_have_no_problems(name: str) -> None:
    config = yaml.safe_load(find_accelerate_config(name).read_text())
    values = recipe(dtype="float32", bf16=False) if config.get("use_cpu") else RECIPE
    assert validate(name, values) != []


def test_validate_command(tmp_path: Path, capsys) -> None:
    import argparse

    from hf_fsdp_qlora.commands import validate as command

    (tmp_path / "a.yaml").write_text(yaml.safe_dump(FSDP2))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(recipe(optim="adafactor")))
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    line = ["validate", "--accelerate_config", str(tmp_path / "a.yaml"), "--config"]
    assert command.run(parser.parse_args([*line, str(tmp_path / "r.yaml")])) == 0
    assert "no problems" in capsys.readouterr().out
    assert command.run(parser.parse_args([*line, str(tmp_path / "bad.yaml"), "--json"])) == 1
    assert json.loads(capsys.readouterr().out)["problems"][0]["rule"] == "optimizer_works_on_shards"


def _step_on_shards(name: str) -> str:
    """One step of a transformers optimizer on a module that FSDP2 has sharded; "ok" or the error."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import Trainer, TrainingArguments

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    arguments = TrainingArguments(optim=name, use_cpu=True, output_dir="unused", report_to="none")
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = optimizer_class(model.parameters(), **kwargs)
    model(torch.randn(4, 64)).sum().backward()
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return "ok"


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_32bit", "adafactor", "adamw_torch_fused"])
def test_optimizers_fail_on_shards_as_the_rule_says(name: str) -> None:
    outcome = run_distributed(_step_on_shards, name)[0]
    assert (outcome != "ok") == (name in (*BITSANDBYTES_OPTIMIZERS, "adafactor")), outcome


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfd_packing_keeps_samples_apart_without_flash_attention(attention: str) -> None:
    """What the packing rule rests on: position ids alone separate samples. The reference is each sample by itself;
    float32, so that the tolerance is rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import make_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama"), attn_implementation=attention).float().eval()
    first, second = torch.randint(3, 250, (1, 12)), torch.randint(3, 250, (1, 9))
    positions = torch.cat([torch.arange(12), torch.arange(9)])[None]
    with torch.no_grad():
        alone = torch.cat([model(first).logits, model(second).logits], dim=1)
        packed = model(torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def _reentrant_outcome(path: str, output_dir: str, check: bool) -> str:
    """The error of one step with reentrant checkpointing; without the check, the one that the rule predicts."""
    from hf_fsdp_qlora.trainer_compat import patches

    if not check:
        patches.TRAINER_RULES = ()
    try:
        run: dict[str, Any] = dict(
            max_steps=1, save_strategy="no", gradient_checkpointing_kwargs={"use_reentrant": True}
        )
        return str(train(path, output_dir, **run)["losses"])
    except (ConfigError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("name", "check", "expected"),
    [
        ("ddp", True, "ConfigError: .*use_reentrant"),
        pytest.param(
            "ddp", False, "RuntimeError: Expected to mark a variable ready only once", marks=pytest.mark.slow
        ),
        pytest.param("fsdp2-full", True, r"\[\d\.\d+\]", marks=pytest.mark.slow),
    ],
)
def test_reentrant_checkpointing_fails_under_ddp_alone(name: str, check: bool, expected: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")
    for outcome in launch(name, _reentrant_outcome, str(path), str(tmp_path / "out"), check):
        assert re.match(expected, outcome, re.DOTALL), outcome
