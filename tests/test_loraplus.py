"""LoRA+ through the trainer: PEFT's parameter groups, on sharded parameters, with resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_fsdp_qlora.config import load_recipe
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.train import optimizer_choice
from tests.distributed import run_distributed
from tests.tiny_models import save_tiny_model
from tests.trainer_story import launch_env, make_trainer


def recipe_with(ratio: float) -> Any:
    values = {"loraplus_lr_ratio": str(ratio), "learning_rate": "0.001", "bf16": "false", "optim": "adamw_torch"}
    return load_recipe("demo/sft", values)


def train(model_path: str, output_dir: str, resume: str | None) -> dict[str, Any]:
    trainer = make_trainer(model_path, output_dir, optimizer_cls_and_kwargs=optimizer_choice(recipe_with(16.0)))
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.optimizer is not None
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}  # type: ignore[union-attr]
    groups = [
        (group["initial_lr"], sorted({"B" if "lora_B" in names[id(p)] else "A" for p in group["params"]}))
        for group in trainer.optimizer.param_groups
    ]
    return {"groups": groups, "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def test_b_learns_faster_and_a_resumed_run_goes_on_the_same(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    whole = run_distributed(train, model, str(tmp_path / "out"), None, env=launch_env("fsdp2"))
    (alone,) = run_distributed(
        train, model, str(tmp_path / "one"), None, world_size=1, process_group=False, env=launch_env("plain")
    )
    resumed = run_distributed(
        train, model, str(tmp_path / "again"), str(tmp_path / "out" / "checkpoint-2"), env=launch_env("fsdp2")
    )
    lr = 0.001
    assert [group for group in whole[0]["groups"] if group[1]] == [(lr, ["A"]), (lr * 16, ["B"])]
    # float32, the same global batches.
    assert whole[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert resumed[0]["losses"] == whole[0]["losses"]


def test_ratio_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be 1 or more"):
        optimizer_choice(recipe_with(0.5))
    assert optimizer_choice(load_recipe("demo/sft")) is None
