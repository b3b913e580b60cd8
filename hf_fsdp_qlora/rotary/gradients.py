"""Averaging gradients over the ranks, for parameters that no engine looks after.

DDP decides when it wraps a model what it will reduce, and FSDP2 what it will shard, so neither can follow a trained
block around the model. Rotary parameters are therefore kept from both: every rank has a whole gradient of its own, and
when backward of the last micro-batch has added to it, the mean over the ranks is made in place. Clipping and the
optimizer then see what they would see in one process. Earlier micro-batches do not communicate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor, nn

from hf_fsdp_qlora.distributed import world_size


class GradientReducer:
    """Hooks that reduce the gradients of these parameters while backward goes on.

    The order in which backward reaches parameters is that of the graph, so it is the same on every rank.

    Args:
        parameters: replicated, equal on every rank.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._pending: list[Any] = []
        if world_size() > 1:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._reduce)

    def _reduce(self, parameter: Tensor) -> None:
        if not GradientState().sync_gradients:  # the Trainer sets it before each micro-batch
            return
        assert parameter.grad is not None
        if not self._pending:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]
        parameter.grad.div_(world_size())  # before the sum, as DDP does: 16-bit sums of many ranks could overflow
        self._pending.append(dist.all_reduce(parameter.grad, async_op=True))

    def _finish(self) -> None:
        for work in self._pending:
            work.wait()
        self._pending.clear()
