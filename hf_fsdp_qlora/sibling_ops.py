"""Products of several quantised layers that read one input, each with its LoRA adapter.

For layers i with weight Wi and adapter Ai, Bi: outputs x Wi^T + s (x Ai^T) Bi^T, as `row_ops.apply_lora_linear` gives
them one by one. Together they need one x A^T, and B rides along as columns of the dequantised weight, where the large
product sums it in float32: no update the size of an output is written or read. For code that is traced: a compiler
merges the small operations that Python pays for one by one.

A part is what one product computes. Small weights form one part together, which saves launches; large ones a part
each, so that forward holds one dequantised weight at a time. (The compiler orders backward, and may hold two there.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fsdp_qlora.formats import WideShape
from hf_fsdp_qlora.quantization import backend_by_spec
from hf_fsdp_qlora.row_ops import add_product, as_bytes, products_in, scaled

TENSORS = 5
"""Per layer: weight, weight_stats, bias or None, lora_a, lora_b."""


@dataclass(frozen=True)
class SiblingShape:
    """What is constant of layers that read one input.

    Attributes:
        spec: of their backend.
        parts: the weight of each product; the layers of all parts in order are the siblings.
        scaling: of every adapter.
    """

    spec: str
    parts: tuple[WideShape, ...]
    scaling: float

    @property
    def key(self) -> str:
        """A string that stands for this shape where objects cannot go: see `share_shape`."""
        return repr(self)

    def layers(self) -> list[tuple[WideShape, int, int]]:
        """Each part with its first layer and the one past its last."""
        placed, end = [], 0
        for part in self.parts:
            placed.append((part, end, end + len(part.ranks)))
            end += len(part.ranks)
        return placed


_SHAPES: dict[str, SiblingShape] = {}


def share_shape(shape: SiblingShape) -> str:
    """The key under which the products find a shape: traced code passes constants, not objects, to a Function."""
    _SHAPES[shape.key] = shape
    return shape.key


class _LoraSiblings(torch.autograd.Function):
    """All outputs at once.

    Args:
        input: (..., in_features) in the compute dtype.
        key: of `share_shape`.
        tensors: `TENSORS` of each layer: codes and statistics in any storage dtype, bias (out_features,) or None,
            which gets no gradient, A (r, in_features), B (out_features, r).

    Returns:
        (..., out_features) of each layer.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, key: str, *tensors: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        shape, dtype = _SHAPES[key], input.dtype
        weights, stats, biases, lora_a, lora_b = (tensors[index::TENSORS] for index in range(TENSORS))
        rows = input.reshape(-1, input.shape[-1])
        a, bs = torch.cat(lora_a).to(dtype), [b.to(dtype) for b in lora_b]
        with products_in(input):
            at_a = scaled(torch.nn.functional.linear(rows, a), shape.scaling)
            wide = torch.cat([rows, at_a], dim=1)
            outputs: list[Tensor] = []
            for part, start, end in shape.layers():
                dense = _dense(shape.spec, part, weights[start:end], stats[start:end], bs[start:end], input)
                bias = None if biases[0] is None else torch.cat(biases[start:end]).to(dtype)
                output = torch.nn.functional.linear(wide, dense, bias)
                outputs += output.view(*input.shape[:-1], -1).split(part.out_features, dim=-1)
        ctx.save_for_backward(wide, a, *weights, *stats, *bs)
        ctx.key = key
        ctx.adapter_dtypes = [(one.dtype, other.dtype) for one, other in zip(lora_a, lora_b, strict=True)]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        shape = _SHAPES[ctx.key]
        wide, a, *rest = ctx.saved_tensors
        count = len(grad_outputs)
        weights, stats, bs = rest[:count], rest[count : 2 * count], rest[2 * count :]
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        with products_in(wide):
            grad_input = grad_at_a = None
            for part, start, end in shape.layers():
                grad = grads[start] if end - start == 1 else torch.cat(grads[start:end], dim=1)
                dense = _dense(shape.spec, part, weights[start:end], stats[start:end], bs[start:end], grad)
                # Two products: a few columns more would cost the large one another round of tiles.
                grad_at_a = _sum(grad_at_a, grad, dense[:, part.in_features :])
                if ctx.needs_input_grad[0]:  # not in the first layer, if its input is kept
                    grad_input = _sum(grad_input, grad, dense[:, : part.in_features])
            assert grad_at_a is not None
            grad_at_a = scaled(grad_at_a, shape.scaling)
            if grad_input is not None:
                grad_input = add_product(grad_input, grad_at_a, a).view(*grad_outputs[0].shape[:-1], -1)
            ranks = [b.shape[1] for b in bs]
            grad_a = (grad_at_a.t() @ wide[:, : a.shape[1]]).split(ranks)
            at_a = wide[:, a.shape[1] :].split(ranks, dim=1)
            grad_b = [grad.t() @ own for grad, own in zip(grads, at_a, strict=True)]
        of_layers: list[Any] = []
        for (a_dtype, b_dtype), one, other in zip(ctx.adapter_dtypes, grad_a, grad_b, strict=True):
            of_layers += [None, None, None, one.to(a_dtype), other.to(b_dtype)]
        return grad_input, None, *of_layers


apply_lora_siblings: Callable[..., tuple[Tensor, ...]] = _LoraSiblings.apply


def _dense(
    spec: str,
    part: WideShape,
    weights: Sequence[Tensor],
    stats: Sequence[Tensor],
    bs: Sequence[Tensor],
    used_with: Tensor,
) -> Tensor:
    """`QuantizationBackend.dequantize_wide` of rows in any storage dtype."""
    codes, statistics = [as_bytes(rows) for rows in weights], [as_bytes(rows) for rows in stats]
    return backend_by_spec(spec).dequantize_wide(codes, statistics, bs, part, used_with)


def _sum(before: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left @ right if before is None else add_product(before, left, right)
