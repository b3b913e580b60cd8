"""The Trainer's filter of losses that are NaN or infinite (`logging_nan_inf_filter`, which is on unless one says
otherwise), without waiting for the GPU.

transformers looks at every loss on the host, right after it has queued the backward pass. So it waits for the GPU, and
then the GPU waits while clipping, the optimizer and `zero_grad` are launched: 12 ms of idle GPU in a profiled step of
32 layers with LoRA (benchmarks/NOTES_speed.md). Here a kernel leaves such losses out of the sum that is logged.

The argument is off from the end of `training_step` until the Trainer has added the loss. Callbacks, checkpoints and
logs have the user's; who reads it in between, in a `training_step` that has called ours, finds it off. All of it can
go when transformers filters on the device (`Trainer._run_epoch`, 5.23).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import Trainer

from hf_fsdp_qlora.trainer_compat.model import attachment

_IN_LOOP = "hf_fsdp_qlora_in_loop"
_LOSS_BEFORE = "hf_fsdp_qlora_loss_before"


def patched_inner_training_loop(stock: Any) -> Any:
    """Filter inside the Trainer's own loop only, and leave nothing of it behind, however the loop ends."""

    @functools.wraps(stock)
    def _inner_training_loop(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        setattr(trainer, _IN_LOOP, True)
        try:
            return stock(trainer, *args, **kwargs)
        finally:
            _take_loss_before(trainer)
            vars(trainer).pop(_IN_LOOP, None)  # a callback may have trained again in this loop

    return _inner_training_loop


def patched_training_step(stock: Any) -> Any:
    """Keep the sum of losses as it was before this step, and the host from looking at what the step adds."""

    @functools.wraps(stock)
    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        _take_loss_before(trainer)  # of a step whose loss nobody added, such as a callback's
        loss = stock(trainer, *args, **kwargs)
        in_loop = hasattr(trainer, _IN_LOOP) and attachment(trainer.model) is not None
        if in_loop and trainer.args.logging_nan_inf_filter:
            setattr(trainer, _LOSS_BEFORE, trainer._tr_loss.clone())
            trainer.args.logging_nan_inf_filter = False
        return loss

    return training_step


def patched_track_num_input_tokens(stock: Any) -> Any:
    """Filter, in what the Trainer calls right after it has added a loss."""

    @functools.wraps(stock)
    def _track_num_input_tokens(trainer: Any, *args: Any, **kwargs: Any) -> None:
        before = _take_loss_before(trainer)
        if before is not None:
            trainer._tr_loss = filtered(trainer, before)
        stock(trainer, *args, **kwargs)

    return _track_num_input_tokens


def filtered(trainer: Trainer, before: torch.Tensor) -> torch.Tensor:
    """The sum of losses, or if the last one made it NaN or infinite what stock makes of the sum `before` it: that loss
    counts as the mean of those since the last log. ()"""
    state: Any = trainer
    steps = 1 + trainer.state.global_step - state._globalstep_last_logged
    return torch.where(torch.isfinite(state._tr_loss), state._tr_loss, before + before / steps)


def _take_loss_before(trainer: Trainer) -> torch.Tensor | None:
    """What `training_step` kept, if anything; the argument is as the user set it again."""
    before = vars(trainer).pop(_LOSS_BEFORE, None)
    if before is not None:
        trainer.args.logging_nan_inf_filter = True
    return before
