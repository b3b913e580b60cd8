"""The Trainer's filter of losses that are NaN or infinite (`logging_nan_inf_filter`, which is on unless one says
otherwise), without waiting for the GPU.

transformers looks at every loss on the host, right after it has queued the backward pass. So it waits for the GPU, and
then the GPU waits while clipping, the optimizer and `zero_grad` are launched: some 15 to 20 ms a step for 32 layers
with LoRA (benchmarks/NOTES_speed.md). Here a kernel leaves such losses out of the sum that is logged; nobody waits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import Trainer

from hf_fsdp_qlora.trainer_compat.model import attachment

_LOSS_BEFORE = "hf_fsdp_qlora_loss_before"


def patched_training_step(stock: Any) -> Any:
    """Keep the sum of losses as it was before this step, and the host from looking at what the step adds.

    The argument is off only until the Trainer has added the loss: callbacks, checkpoints and logs have the user's. Can
    go when transformers filters on the device (`Trainer._run_epoch`, 5.23).
    """

    @functools.wraps(stock)
    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = stock(trainer, *args, **kwargs)
        is_training = hasattr(trainer, "_tr_loss")  # else somebody's own loop
        if is_training and trainer.args.logging_nan_inf_filter and attachment(trainer.model) is not None:
            setattr(trainer, _LOSS_BEFORE, trainer._tr_loss.clone())
            trainer.args.logging_nan_inf_filter = False
        return loss

    return training_step


def patched_track_num_input_tokens(stock: Any) -> Any:
    """Filter, in what the Trainer calls right after it has added a loss: one that is NaN or infinite counts as the
    mean of those since the last log, as in stock."""

    @functools.wraps(stock)
    def _track_num_input_tokens(trainer: Any, *args: Any, **kwargs: Any) -> None:
        before = vars(trainer).pop(_LOSS_BEFORE, None)
        if before is not None:
            trainer.args.logging_nan_inf_filter = True
            trainer._tr_loss = filtered(trainer, before)
        stock(trainer, *args, **kwargs)

    return _track_num_input_tokens


def filtered(trainer: Trainer, before: torch.Tensor) -> torch.Tensor:
    """The sum of losses, or where the last one spoiled it what stock makes of the sum `before` it. ()"""
    state: Any = trainer
    steps = 1 + trainer.state.global_step - state._globalstep_last_logged
    return torch.where(torch.isfinite(state._tr_loss), state._tr_loss, before + before / steps)
