"""Which LoRA layers compute together in compiled code: those that a decoder layer calls with one and the same input.

The model's own code calls query, key and value one after the other. When that is traced, the first call computes all
three (sibling_ops.py) and leaves the others' outputs here; the next calls, if they come with that same tensor, take
theirs. Otherwise they compute alone, and the compiler drops what nobody took. A hook on the module that called them
forgets the outputs: what outlived the trace would be kept with all that its backward needs.

Eager code computes one by one: what is saved there in launches is spent in Python (benchmarks/NOTES_speed.md). Left
out too: finding siblings by watching a forward; they are known by the names that transformers' decoders share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hf_fsdp_qlora.formats import ONE_PRODUCT_BYTES, WideShape
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.sibling_ops import SiblingShape, apply_lora_siblings, share_shape

NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that read the same input, in the order they are called."""

VALUE, NORM = "v_proj", "q_norm"
"""The value is what attention's backward reads as it was made; query and key are rotated first. As a view of the
output of one product it would keep theirs, so it is copied, except where norms of query and key keep them anyway."""


class LoraSiblings:
    """Layers that read one input, for one adapter.

    Args:
        members: `QuantizedLoraLinear`s, in the order they are called.
        name: of the adapter.
        shape: of their products.
        copied: the member whose output is copied if it is a view, if any.
    """

    def __init__(self, members: Sequence[Any], name: str, shape: SiblingShape, copied: Any = None) -> None:
        self.members = tuple(members)
        self.copied = copied
        self.name = name
        self.shape = shape
        self.key = share_shape(shape)
        self.ranks = tuple(rank for part in shape.parts for rank in part.ranks)
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] | None = None

    def output(self, layer: Any, x: Tensor, name: str) -> Tensor | None:
        """The output of one member, or None if it is to compute alone."""
        if not torch.compiler.is_compiling() or name != self.name:
            return None
        if layer is self.members[0]:
            if not self._alike(x):
                return None
            self._input, self._outputs = x, self._compute(x)
        if self._outputs is None or x is not self._input:
            return None
        own = next(own for member, own in zip(self.members, self._outputs, strict=True) if member is layer)
        return own.contiguous() if layer is self.copied else own

    def forget(self, *_: Any) -> None:
        """A forward hook of the module that calls the members: nothing stays for the next call."""
        self._input = self._outputs = None

    def _alike(self, x: Tensor) -> bool:
        """Whether every member still means what it meant when they were joined."""
        for member, rank in zip(self.members, self.ranks, strict=True):
            watched = member.base_layer._forward_hooks or member.base_layer._forward_pre_hooks
            if watched or self.name not in member.lora_A or not member.fusible(x, self.name):
                return False
            if member.base_layer.product_dtype(x.device.type) != member.base_layer.dtype:  # the kernel casts nothing
                return False
            if member.r[self.name] != rank or member.scaling[self.name] != self.shape.scaling:
                return False
        return True

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        tensors: list[Any] = []  # see `sibling_ops.TENSORS`
        for member in self.members:
            base: Any = member.base_layer
            tensors += [base.weight, base.weight_stats, base.bias]
            tensors += [member.lora_A[self.name].weight, member.lora_B[self.name].weight]
        dtype = self.members[0].base_layer.product_dtype(x.device.type)
        return tuple(output.to(x.dtype) for output in apply_lora_siblings(x.to(dtype), self.key, *tensors))


def join_siblings(model: nn.Module, name: str) -> None:
    """Let the quantised layers of an adapter that read one input compute together when they are compiled, where their
    format can. For models whose layers will be.

    With transformers 5.23 checkpointing is inside a compiled layer, and torch then refuses to trace a forward that
    changes an object, because recomputing would not change it again. What is left here is gone when forward ends, so
    that is allowed, for the process. (There is no narrower setting.)

    Args:
        model: with the adapter injected; on meta or not.
        name: of the adapter.
    """
    for parent in model.modules():
        for names in NAMES:
            called = [parent._modules.get(child) for child in names]
            children: list[Any] = [child for child in called if isinstance(child, LoraLayer)]
            shape = _shape(children, name)
            if shape is not None:
                torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
                copied = None if NORM in parent._modules else parent._modules.get(VALUE)
                siblings = LoraSiblings(children, name, shape, copied)
                parent.register_forward_hook(siblings.forget)
                for child in children:
                    child.siblings = siblings


def _shape(children: Sequence[Any], name: str) -> SiblingShape | None:
    """The shape of the products, or None where layers cannot share any."""
    if len(children) < 2 or not all(name in child.lora_A for child in children):
        return None
    bases = [child.base_layer for child in children]
    if not all(isinstance(base, QuantizedLinear) for base in bases):
        return None
    alike = {(base.backend.spec, base.in_features, base.bias is None, child.scaling[name])
             for base, child in zip(bases, children, strict=True)}  # fmt: skip
    if len(alike) > 1 or any(child.lora_variant for child in children):
        return None
    backend, in_features, ranks = bases[0].backend, bases[0].in_features, [child.r[name] for child in children]
    sizes = [base.out_features for base in bases]
    columns = sum(ranks)
    if sum(sizes) * in_features * backend.dtype.itemsize <= ONE_PRODUCT_BYTES:
        parts = [WideShape(in_features, tuple(sizes), tuple(ranks), columns)]
    else:
        parts = [
            WideShape(in_features, (size,), (rank,), columns, sum(ranks[:index]))
            for index, (size, rank) in enumerate(zip(sizes, ranks, strict=True))
        ]
    if not all(backend.joins(part) for part in parts):
        return None
    return SiblingShape(backend.spec, tuple(parts), children[0].scaling[name])
