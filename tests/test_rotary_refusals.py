"""What rotary training refuses, and what it tells the user to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.loading import load_model
from hf_fsdp_qlora.quantization import LinearInt8Config
from hf_fsdp_qlora.rotary.config import RotaryConfig
from hf_fsdp_qlora.rotary.prepare import prepare_rotary
from tests.distributed import run_distributed
from tests.rotary_story import make_rotary_trainer
from tests.tiny_models import save_tiny_model
from tests.trainer_story import NF4, launch, launch_env

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), dtype=BF16))


def _prepared(model_path: str, config: RotaryConfig, **load: Any) -> Any:
    model: Any = load_model(model_path, **{"rotary": config, "dtype": BF16, **load})
    return prepare_rotary(model, config)


INT8 = RotaryConfig(frozen="int8")


@pytest.mark.parametrize(
    ("config", "load", "message"),
    [
        (INT8, {"rotary": None, "peft_config": LoraConfig(task_type="CAUSAL_LM")}, "has an adapter"),
        (INT8, {"peft_config": LoraConfig(task_type="CAUSAL_LM")}, "use_peft: false"),
        (INT8, {"rotary": None}, "was loaded with no quantised layers"),
        (INT8, {"rotary": None, "quantization_config": LinearInt8Config(64)}, "frozen='int8', but .*block=64"),
        (RotaryConfig(frozen="bf16"), {"quantization_config": BitsAndBytesConfig(**NF4)}, "frozen='bf16', but"),
        (INT8, {"dtype": torch.float16}, "float16 cannot hold"),
        (RotaryConfig(master_dtype="bfloat16"), {"dtype": torch.float32}, "would round what the device has"),
    ],
)
def test_models_that_cannot_be_trained_in_turn_are_refused(
    model_path: str, config: RotaryConfig, load: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _prepared(model_path, config, **load)


def test_a_model_is_prepared_once_and_only_if_load_model_loaded_it(model_path: str) -> None:
    with pytest.raises(ConfigError, match="not loaded by load_model"):
        prepare_rotary(AutoModelForCausalLM.from_pretrained(model_path), INT8)
    rotary = _prepared(model_path, INT8)
    with pytest.raises(ConfigError, match="was called on this model before"):
        prepare_rotary(rotary.model, INT8)


def test_fsdp2_model_that_was_not_loaded_for_it_is_refused(model_path: str) -> None:
    for message in launch("fsdp2-full", _refusal_under_fsdp2, model_path):
        assert "FSDP2 has sharded" in message and "rotary=config" in message


def _refusal_under_fsdp2(model_path: str) -> str:
    with pytest.raises(ConfigError) as error:
        _prepared(model_path, INT8, rotary=None, quantization_config=INT8.frozen_format)
    return str(error.value)


@pytest.mark.parametrize(
    ("fsdp", "message"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "offload='all' with rotary training"),
        ({"FSDP_VERSION": "1"}, "does not work under FSDP1"),
    ],
)
def test_offload_and_fsdp1_are_refused(model_path: str, fsdp: dict[str, str], message: str) -> None:
    for error in run_distributed(_refusal, model_path, env={**launch_env("fsdp2"), **fsdp}, process_group=False):
        assert message in error


def _refusal(model_path: str) -> str:
    with pytest.raises(ConfigError) as error:
        _prepared(model_path, INT8)
    return str(error.value)


def test_trainers_that_are_not_set_up_for_it_are_refused(model_path: str, tmp_path: Path) -> None:
    for optim in ("adafactor", "paged_adamw_8bit", "ademamix"):
        with pytest.raises(ConfigError, match=f"optim='{optim}' cannot train flat slices"):
            make_rotary_trainer(model_path, str(tmp_path), optim=optim)
    trainer, _ = make_rotary_trainer(model_path, str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match="Reentrant gradient checkpointing"):
        trainer.train()
    trainer, _ = make_rotary_trainer(model_path, str(tmp_path))
    trainer.optimizer_cls_and_kwargs = None
    with pytest.raises(ConfigError, match=r"optimizer_cls_and_kwargs=rotary.optimizer\(args\)"):
        trainer.train()
    trainer, prepared = make_rotary_trainer(model_path, str(tmp_path))
    next(iter(prepared.active.parameters.values())).parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="1 parameters require gradients and are not trained in turn"):
        trainer.train()
