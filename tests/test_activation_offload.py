"""TRL's `activation_offloading` over quantised layers: the same gradients, and rows are never copied to the host.

TRL asks torch for an accelerator, so that the option itself needs one (the last test). On the CPU its context manager
runs with the CPU standing in for the accelerator: what is packed and unpacked is the same, streams and pinning aside.
Reference: the same step without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from hf_fsdp_qlora import QuantizedLinear, load_model
from hf_fsdp_qlora.integrity import check_integrity
from tests.distributed import run_distributed
from tests.loading_story import CPU, FSDP2, batch, nf4
from tests.tiny_models import save_tiny_model
from tests.trainer_story import launch_env, make_trainer, report


def step(path: str, offload: bool, checkpointing: bool) -> dict[str, Any]:
    """Gradients of two steps, and the shapes of what was copied to the host in between."""
    torch.accelerator.current_accelerator = lambda *_: torch.device("cpu")  # type: ignore[assignment]
    torch.cpu.empty_cache = lambda: None  # type: ignore[attr-defined]
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    model: Any = load_model(path, quantization_config=nf4(), peft_config=lora, dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    context = get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False, warn_if_no_head=False)
    copied: list[tuple[int, ...]] = []
    for _ in range(2):
        if offload:
            with context:
                loss = model(**batch()).loss
            copied += [tuple(entry[0].shape) for entry in context.tracker.values() if entry[1]]
        else:
            loss = model(**batch()).loss
        loss.backward()
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    row_shapes = {tuple(rows.shape) for layer in layers for rows in (layer.weight, layer.weight_stats)}
    gradients: dict[str, Tensor] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: getattr(grad, "full_tensor", lambda grad=grad: grad)() for name, grad in gradients.items()}
    return {
        "grads": whole,
        "copied": copied,
        "rows": row_shapes,
        "loss": loss.item(),
        "checked": check_integrity(model),
    }


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize("engine", ["one process", "fsdp2"])
def test_gradients_are_the_same_and_no_rows_are_copied(engine: str, checkpointing: bool, tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path))
    launch: dict[str, Any] = dict(env=FSDP2) if engine == "fsdp2" else dict(env=CPU, world_size=1, process_group=False)
    expected, *_ = run_distributed(step, path, False, checkpointing, **launch)
    for result in run_distributed(step, path, True, checkpointing, **launch):
        assert result["copied"] and not result["rows"] & set(result["copied"])
        assert result["loss"] == expected["loss"] and result["checked"] == expected["checked"] > 0
        assert len(result["grads"]) == 28
        for name, grad in expected["grads"].items():
            assert torch.equal(result["grads"][name], grad), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_trainer_option_gives_the_same_losses(tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path / "model"))
    runs = [
        run_distributed(
            train, path, str(tmp_path / name), offload, world_size=1, process_group=False,
            env={**launch_env("plain"), "ACCELERATE_USE_CPU": "false"},
        )[0]
        for name, offload in (("with", True), ("without", False))
    ]  # fmt: skip
    assert runs[0]["losses"] == runs[1]["losses"] and len(runs[0]["losses"]) == 4


def train(path: str, output_dir: str, offload: bool) -> dict[str, Any]:
    trainer = make_trainer(path, output_dir, dtype=torch.bfloat16, activation_offloading=offload, use_cpu=False)
    trainer.train()
    return report(trainer)
