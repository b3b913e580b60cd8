"""How the Trainer saves and resumes a model with an adapter: PEFT directories, on every engine.

Factories as in patches.py. Models without an adapter are full_training.py's.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from transformers import Trainer

from hf_fsdp_qlora.distributed import same_outcome
from hf_fsdp_qlora.export import restore_adapter
from hf_fsdp_qlora.trainer_compat.checkpoints import has_optimizer, restore_optimizer
from hf_fsdp_qlora.trainer_compat.model import attachment


def _patched_save_model(stock: Any) -> Any:
    """Write the adapter under SHARDED_STATE_DICT too, where the Trainer writes no model at all (not even the
    directory, so `load_best_model_at_end` finds no checkpoint); and if the writing rank fails, fail on every rank: the
    others would wait in the next collective.

    https://github.com/huggingface/transformers/issues/30491. Can go when `Trainer.save_model` does both.
    """

    @functools.wraps(stock)
    def save_model(trainer: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Without FSDP a script may save on one rank alone; the checkpoints of training are saved by all.
        together = trainer.is_fsdp_enabled or (_internal_call and trainer.is_in_train)
        if attachment(trainer.model) is None or not together:
            stock(trainer, output_dir, _internal_call)
            return
        state_dict = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        with same_outcome(f"saving the model to {output_dir or trainer.args.output_dir}"):
            if trainer.args.should_save:
                trainer._save(output_dir, state_dict=state_dict)
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    return save_model


def _patched_save_optimizer(stock: Any) -> Any:
    """As `_patched_save_model`, for the optimizer and the scheduler under DDP. Under FSDP the stock method gathers,
    and what it calls is replaced (`patched_save_fsdp_optimizer`). Can go with `_patched_save_model`."""

    @functools.wraps(stock)
    def _save_optimizer_and_scheduler(trainer: Trainer, output_dir: str) -> None:
        if attachment(trainer.model) is None or trainer.is_fsdp_enabled:
            stock(trainer, output_dir)
            return
        with same_outcome(f"saving the optimizer state to {output_dir}"):
            stock(trainer, output_dir)

    return _save_optimizer_and_scheduler


def _patched_save_fsdp_model(stock: Any) -> Any:
    """Do not write the adapter a second time (`pytorch_model_fsdp*`): nothing reads that file here, and it would keep
    stock trainers without FSDP from resuming.

    https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/trainer.py (_load_from_checkpoint). Can
    go when the Trainer reads adapters from the PEFT directory under FSDP.
    """

    @functools.wraps(stock)
    def save_fsdp_model(plugin: Any, accelerator: Accelerator, model: Any, *args: Any, **kwargs: Any) -> None:
        if _our_peft_model(model) is None:
            stock(plugin, accelerator, model, *args, **kwargs)

    return save_fsdp_model


def _patched_load_from_checkpoint(stock: Any) -> Any:
    """Resume weights from the PEFT directory, whatever engine saved it, and refuse one that does not fit. Stock code
    goes by the files it finds: accelerate's (none here), else PEFT's `load_adapter`, which skips tensors it does not
    know and fails on one rank alone. Can go with `_patched_save_fsdp_model`."""

    @functools.wraps(stock)
    def _load_from_checkpoint(trainer: Trainer, resume_from_checkpoint: str, model: Any = None) -> None:
        ours = _our_peft_model(trainer.model)
        if ours is None:
            stock(trainer, resume_from_checkpoint, model)
        else:
            restore_adapter(ours, resume_from_checkpoint)

    return _load_from_checkpoint


def _patched_load_best_model(stock: Any) -> Any:
    """As `_patched_load_from_checkpoint`, for `load_best_model_at_end`."""

    @functools.wraps(stock)
    def _load_best_model(trainer: Trainer) -> None:
        ours, checkpoint = _our_peft_model(trainer.model), trainer.state.best_model_checkpoint
        if ours is None or checkpoint is None:
            stock(trainer)
        else:
            restore_adapter(ours, checkpoint)

    return _load_best_model


def _patched_load_optimizer(stock: Any) -> Any:
    """Resume the optimizer whatever engine and `fsdp_state_dict_type` saved it; stock code knows only its own file
    and raises a KeyError, or hangs in a collective. Can go when the Trainer keys optimizer states by name always."""

    @functools.wraps(stock)
    def _load_optimizer_and_scheduler(trainer: Trainer, checkpoint: str | None) -> None:
        ours = _our_peft_model(trainer.model)
        if checkpoint is None or ours is None or not has_optimizer(Path(checkpoint)):
            stock(trainer, checkpoint)
            return
        assert trainer.optimizer is not None and trainer.lr_scheduler is not None  # made just before
        restore_optimizer(ours, trainer.optimizer, Path(checkpoint))
        trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    return _load_optimizer_and_scheduler


def _our_peft_model(model: Any) -> PeftModel | None:
    """The PeftModel that `attach` marked, out of any wrapper, or None."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner if isinstance(inner, PeftModel) and attachment(inner) is not None else None


ADAPTER_PATCHES = (
    (Trainer, "save_model", _patched_save_model),
    (Trainer, "_save_optimizer_and_scheduler", _patched_save_optimizer),
    (transformers.trainer, "save_fsdp_model", _patched_save_fsdp_model),
    (Trainer, "_load_from_checkpoint", _patched_load_from_checkpoint),
    (Trainer, "_load_best_model", _patched_load_best_model),
    (Trainer, "_load_optimizer_and_scheduler", _patched_load_optimizer),
)
"""What `install` puts in place."""
