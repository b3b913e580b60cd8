"""Evaluate what will be saved: the model as its masters have it, not as the device's quantised blocks do.

The device holds quantised rows of parked layers, so a loss measured there is not the loss of the exported model.
Inside `masters_in_forward` each decoder layer gets its weights from the masters just before it runs and loses them
right after it, so the device holds one layer more than before. They are cast to the model's dtype, as the export casts
them, so an evaluation in that dtype gives the exported model's loss.

It costs a trip of all masters to the device per forward: large evaluation batches are cheaper. Left out: a second,
whole model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_fsdp_qlora.rotary.active import ActiveSet, RotaryParameter
from hf_fsdp_qlora.rotary.masters import gather_whole
from hf_fsdp_qlora.skeleton import decoder_layers


@contextmanager
def masters_in_forward(model: PreTrainedModel, active: ActiveSet) -> Iterator[None]:
    """While this is open, forwards without gradients compute with the masters. Forwards are collective then.

    Active blocks compute with their masters anyway, and so does what is parked unquantised.

    Args:
        model: whose decoder layers have the quantised linear layers.
        active: everything that is trained, and what is active now.
    """
    handles = []
    for layer in decoder_layers(model):
        inside = {id(module) for module in layer.modules()}
        parked = [
            owner
            for name, owner in active.parameters.items()
            if owner.layer is not None and id(owner.layer) in inside and name not in active.slices
        ]

        def bring(module: nn.Module, args: Any, parked: list[RotaryParameter] = parked) -> None:
            for owner in parked:
                dtype = owner.parameter.dtype
                owner.parameter.data = gather_whole(active.masters, owner.name, dtype=dtype, device=active.device)

        def drop(module: nn.Module, args: Any, output: Any, parked: list[RotaryParameter] = parked) -> None:
            for owner in parked:
                owner.parameter.data = torch.empty(0, dtype=owner.parameter.dtype, device=active.device)

        handles.append(layer.register_forward_pre_hook(bring))
        handles.append(layer.register_forward_hook(drop, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
