"""Runs of rotary training through the stock SFTTrainer on tiny models, for the tests of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_fsdp_qlora.loading import load_model
from hf_fsdp_qlora.rotary.config import RotaryConfig
from hf_fsdp_qlora.rotary.masters import gather_whole
from hf_fsdp_qlora.rotary.prepare import Rotary, prepare_rotary
from tests.tiny_tokenizer import make_tokenizer
from tests.trainer_story import make_data, world_size_of

FP32 = torch.float32


def sft_config(output_dir: str, model: torch.nn.Module, **config: Any) -> SFTConfig:
    """Accumulation, clipping at every step, weight decay and a schedule; the same global batch on 1 and 2 ranks."""
    settings = dict(
        output_dir=output_dir, per_device_train_batch_size=2 // world_size_of(model), gradient_accumulation_steps=2,
        max_steps=6, logging_steps=1, save_strategy="no", report_to=[], max_grad_norm=0.1, weight_decay=0.1,
        learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=2, gradient_checkpointing=True, max_length=64,
        bf16=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return SFTConfig(**{**settings, **config})  # type: ignore[arg-type]


def make_rotary_trainer(
    model_path: str,
    output_dir: str,
    *,
    rotary: dict[str, Any] | None = None,
    dtype: torch.dtype = FP32,
    callbacks: list[Any] | None = None,
    by_format: bool = False,
    **config: Any,
) -> tuple[SFTTrainer, Rotary]:
    """The user's call, on a tiny model; `by_format` tells `load_model` the format and nothing of rotary training."""
    settings = RotaryConfig(**{"active": "100%", "steps_per_block": 2, "frozen": "bf16", **(rotary or {})})
    how: dict[str, Any] = {"quantization_config": settings.frozen_format} if by_format else {"rotary": settings}
    model: Any = load_model(model_path, dtype=dtype, **how)
    prepared = prepare_rotary(model, settings)
    args = sft_config(output_dir, model, **config)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=make_data(32),
        eval_dataset=make_data(8, seed=1),
        processing_class=make_tokenizer(),
        callbacks=[prepared.callback, *(callbacks or [])],
        optimizer_cls_and_kwargs=prepared.optimizer(args),
    )
    return trainer, prepared


def train_rotary(model_path: str, output_dir: str, *, resume: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """Train; what was logged, and the masters as whole tensors."""
    trainer, rotary = make_rotary_trainer(model_path, output_dir, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return {"logs": trainer.state.log_history, **losses(trainer), "weights": weights_of(rotary)}


def train_stock(model_path: str, output_dir: str, *, dtype: torch.dtype = FP32, **config: Any) -> dict[str, Any]:
    """The same run as stock full fine-tuning: `from_pretrained` and the Trainer's own optimizer."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(output_dir, model, **config),
        train_dataset=make_data(32),
        eval_dataset=make_data(8, seed=1),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    names = dict(model.named_parameters())
    return {**losses(trainer), "weights": {name: parameter.detach().clone() for name, parameter in names.items()}}


def losses(trainer: SFTTrainer) -> dict[str, list[float]]:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "losses": [entry["loss"] for entry in steps],
        "grad_norms": [entry["grad_norm"] for entry in steps],
        "learning_rates": [entry["learning_rate"] for entry in steps],
        "eval_losses": evals,
    }


def weights_of(rotary: Rotary) -> dict[str, torch.Tensor]:
    """The masters of all ranks. Collective."""
    masters = rotary.masters
    return {name: gather_whole(masters, name, dtype=masters.dtype, device=torch.device("cpu"))
            for name in masters.stored}  # fmt: skip


def final(folder: Path) -> str:
    return str(folder / "final")
