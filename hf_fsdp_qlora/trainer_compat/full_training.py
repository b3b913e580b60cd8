"""How a method that trains the whole model tells the patches what to do in place of stock saving and loading.

The weights of such a run are not in the model that the trainer holds, so nothing the Trainer would write of it is of
use: `save_model` exports, checkpoints hold the method's own state, and DDP must not wrap the model, because it would
reduce gradients of what was trainable when it did.

The replacements are factories as in patches.py. They can go when the Trainer lets a callback save and load.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer

from hf_fsdp_qlora.distributed import same_outcome

_ATTRIBUTE = "hf_fsdp_qlora_full_training"


class FullTraining(ABC):
    """One run's way of saving and loading. Every method is collective."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model as trained so far, loadable by anything that loads safetensors."""

    @abstractmethod
    def save_checkpoint(self, folder: Path) -> None:
        """Write what `load_checkpoint` needs, weights included."""

    @abstractmethod
    def exact_weights(self) -> AbstractContextManager[None] | None:
        """A context in which the model computes with the weights that `export` writes, for a second evaluation; None
        where there is to be none."""

    @abstractmethod
    def load_checkpoint(self, folder: Path) -> None:
        """Go back to what `save_checkpoint` wrote."""


def set_full_training(model: Any, training: FullTraining) -> None:
    """Leave it on the model, where the patches look for it. `model.save_pretrained` becomes an export: collective."""
    setattr(model, _ATTRIBUTE, training)
    model.save_pretrained = lambda save_directory, **_: training.export(Path(save_directory))


def full_training(model: Any) -> FullTraining | None:
    """What `set_full_training` left on this model, None if it is trained otherwise."""
    return getattr(model, _ATTRIBUTE, None)


def _patched_prepare_model(stock: Any) -> Any:
    """Replaces `Accelerator.prepare_model`: autocast as usual, but no DDP around the model."""

    @functools.wraps(stock)
    def prepare_model(accelerator: Accelerator, model: Any, *args: Any, **kwargs: Any) -> Any:
        if full_training(model) is not None:
            kwargs["evaluation_mode"] = True
        return stock(accelerator, model, *args, **kwargs)

    return prepare_model


def _patched_save_model(stock: Any) -> Any:
    """Replaces `Trainer.save_model`: an export, or in a checkpoint that can be resumed the method's own state."""

    @functools.wraps(stock)
    def save_model(trainer: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        training = full_training(trainer.model)
        if training is None:
            stock(trainer, output_dir, _internal_call)
            return
        folder = Path(output_dir or trainer.args.output_dir or ".")
        if _internal_call and not trainer.args.save_only_model:
            training.save_checkpoint(folder)
        else:
            training.export(folder)
        with same_outcome(f"saving the tokenizer to {folder}"):
            if trainer.args.should_save:
                if trainer.processing_class is not None:
                    trainer.processing_class.save_pretrained(folder)
                torch.save(trainer.args, folder / "training_args.bin")
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    return save_model


def _patched_save_scheduler(stock: Any) -> Any:
    """Replaces `Trainer._save_optimizer_and_scheduler`: the optimizer's state is in the method's own."""

    @functools.wraps(stock)
    def _save_optimizer_and_scheduler(trainer: Trainer, output_dir: str) -> None:
        if full_training(trainer.model) is None:
            stock(trainer, output_dir)
            return
        assert trainer.lr_scheduler is not None
        with same_outcome(f"saving the scheduler to {output_dir}"):
            if trainer.args.should_save:
                torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    return _save_optimizer_and_scheduler


def _patched_load_from_checkpoint(stock: Any) -> Any:
    """Replaces `Trainer._load_from_checkpoint`."""

    @functools.wraps(stock)
    def _load_from_checkpoint(trainer: Trainer, resume_from_checkpoint: str, model: Any = None) -> None:
        training = full_training(trainer.model)
        if training is None:
            stock(trainer, resume_from_checkpoint, model)
        else:
            training.load_checkpoint(Path(resume_from_checkpoint))

    return _load_from_checkpoint


def _patched_load_best_model(stock: Any) -> Any:
    """Replaces `Trainer._load_best_model`."""

    @functools.wraps(stock)
    def _load_best_model(trainer: Trainer) -> None:
        training, checkpoint = full_training(trainer.model), trainer.state.best_model_checkpoint
        if training is None or checkpoint is None:
            stock(trainer)
        else:
            training.load_checkpoint(Path(checkpoint))

    return _load_best_model


def _patched_load_scheduler(stock: Any) -> Any:
    """Replaces `Trainer._load_optimizer_and_scheduler`, see `_patched_save_scheduler`."""

    @functools.wraps(stock)
    def _load_optimizer_and_scheduler(trainer: Trainer, checkpoint: str | None) -> None:
        if checkpoint is None or full_training(trainer.model) is None:
            stock(trainer, checkpoint)
            return
        assert trainer.lr_scheduler is not None and trainer.optimizer is not None
        with same_outcome(f"reading the scheduler from {checkpoint}"):
            trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        # A scheduler sets rates when it steps; the stock method finds them in the optimizer's state.
        for group, rate in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    return _load_optimizer_and_scheduler


WHOLE_MODEL_PATCHES = (
    (Accelerator, "prepare_model", _patched_prepare_model),
    (Trainer, "save_model", _patched_save_model),
    (Trainer, "_save_optimizer_and_scheduler", _patched_save_scheduler),
    (Trainer, "_load_from_checkpoint", _patched_load_from_checkpoint),
    (Trainer, "_load_best_model", _patched_load_best_model),
    (Trainer, "_load_optimizer_and_scheduler", _patched_load_scheduler),
)
"""What `install` puts in place after its own replacements, which these then call for all other models."""
