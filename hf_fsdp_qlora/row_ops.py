"""Matrix products with a weight that is rows of bytes: dequantise, multiply, forget.

Two functions, each with its own backward that gets the packed rows and dequantises again; their arguments stand with
the classes below:

- `apply_linear`: `F.linear(x, W, bias)`.
- `apply_lora_linear`: the same plus s (x A^T) B^T. Written with PEFT's layers the update costs seven passes over the
  output (product, scale, sum: each reads and writes); here the large product adds it while it stores, two passes.

Both are plain `autograd.Function`s: a custom op costs tens of microseconds of Python per call, more than many of the
kernels it launches. `torch.compile` looks into them, so that it launches the products itself and fuses the rest. What
it must not do is keep a dequantised weight for backward: `traced_dequantize` takes the tensor that the weight will be
multiplied with, so that the weight of the backward belongs to the backward for everyone who sorts the graph.

Eager training of small batches is bound by the Python between launches, so these functions make few calls: adapters
are cast once and kept for backward, and nothing is viewed, scaled or put under a context that would not change it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_fsdp_qlora.quantization import backend_by_spec


def dequantize_rows(
    weight: Tensor, weight_stats: Tensor, spec: str, out_features: int, in_features: int, used_with: Tensor
) -> Tensor:
    """(out_features, in_features) in the backend's dtype, from rows in any storage dtype.

    Args:
        used_with: what the weight will be multiplied with; see `QuantizationBackend.traced_dequantize`.
    """
    codes, stats = as_bytes(weight), as_bytes(weight_stats)
    backend, shape = backend_by_spec(spec), (out_features, in_features)
    if torch.compiler.is_compiling():
        return backend.traced_dequantize(codes, stats, shape, used_with)
    return backend.dequantize(codes, stats, shape)


def as_bytes(rows: Tensor) -> Tensor:
    """(num_rows, k) in any dtype -> (num_rows, k * itemsize) uint8, the same memory, outside the graph."""
    return rows if rows.dtype == torch.uint8 else rows.detach().view(torch.uint8)


class _Linear(torch.autograd.Function):
    """`F.linear(input, dequantised weight, bias)` in the dtype of the input.

    Args:
        input: (..., in_features) in the compute dtype.
        weight: (num_rows, code_bytes / itemsize), the codes viewed as the storage dtype.
        weight_stats: (num_rows, stats_bytes / itemsize), the statistics likewise.
        bias: (out_features,) or None.
        spec: names the backend, see `backend_by_spec`.

    Returns:
        (..., out_features) in the dtype of the input.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        weight_stats: Tensor,
        bias: Tensor | None,
        spec: str,
        out_features: int,
        in_features: int,
    ) -> Tensor:
        ctx.save_for_backward(weight, weight_stats)
        ctx.spec, ctx.out_features, ctx.in_features = spec, out_features, in_features
        ctx.bias_dtype = None if bias is None else bias.dtype
        dense = dequantize_rows(weight, weight_stats, spec, out_features, in_features, input).to(input.dtype)
        with products_in(input):
            output = nn.functional.linear(input, dense, None if bias is None else bias.to(input.dtype))
        return own_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        weight, weight_stats = ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            dense = dequantize_rows(weight, weight_stats, ctx.spec, ctx.out_features, ctx.in_features, grad_output).to(
                grad_output.dtype
            )
            with products_in(grad_output):
                grad_input = grad_output @ dense
        if ctx.needs_input_grad[3]:
            grad_bias = grad_output.reshape(-1, ctx.out_features).sum(0).to(ctx.bias_dtype)
        return grad_input, None, None, grad_bias, None, None, None


class _LoraLinear(torch.autograd.Function):
    """`F.linear(input, W, bias) + scaling * input A^T B^T` in the dtype of the input.

    Args:
        input, weight, weight_stats, spec: as in `_Linear`.
        bias: likewise, but it gets no gradient.
        lora_a: (r, in_features), cast to the dtype of the input.
        lora_b: (out_features, r), likewise.

    Returns:
        (..., out_features).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        weight_stats: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        spec: str,
        out_features: int,
        in_features: int,
    ) -> Tensor:
        dtype = input.dtype
        rows, a, b = input.reshape(-1, in_features), lora_a.to(dtype), lora_b.to(dtype)
        dense = dequantize_rows(weight, weight_stats, spec, out_features, in_features, input).to(dtype)
        with products_in(input):
            at_a = scaled(nn.functional.linear(rows, a), scaling)
            update = nn.functional.linear(at_a, b, None if bias is None else bias.to(dtype))
            output = add_product(update, rows, dense.t())
        ctx.save_for_backward(input, at_a, weight, weight_stats, a, b)
        ctx.spec, ctx.out_features, ctx.in_features, ctx.scaling = spec, out_features, in_features, scaling
        ctx.adapter_dtypes = lora_a.dtype, lora_b.dtype
        return own_view(output, (*input.shape[:-1], out_features))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        input, at_a, weight, weight_stats, a, b = ctx.saved_tensors
        rows, grad = input.reshape(-1, ctx.in_features), grad_output.reshape(-1, ctx.out_features)
        grad_input = None
        with products_in(input):
            grad_at_a = scaled(grad @ b, ctx.scaling)
            if ctx.needs_input_grad[0]:  # not in the first layer, if its input is kept
                dense = dequantize_rows(
                    weight, weight_stats, ctx.spec, ctx.out_features, ctx.in_features, grad_output
                ).to(input.dtype)
                grad_input = add_product(grad_at_a @ a, grad, dense).view(input.shape)
                del dense
            a_dtype, b_dtype = ctx.adapter_dtypes
            grad_a = (grad_at_a.t() @ rows).to(a_dtype)
            grad_b = (grad.t() @ at_a).to(b_dtype)
        return grad_input, None, None, None, grad_a, grad_b, None, None, None, None


apply_linear: Callable[..., Tensor] = _Linear.apply
apply_lora_linear: Callable[..., Tensor] = _LoraLinear.apply


def products_in(operand: Tensor) -> AbstractContextManager[object]:
    """Products in the dtype of the operand: without autocast, unless that would change nothing."""
    device = operand.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != operand.dtype:
        return torch.autocast(device, enabled=False)
    return nullcontext()


def scaled(product: Tensor, scaling: float) -> Tensor:
    """scaling * product, in its memory. For the (n, r) products of an adapter: the smallest there are to scale."""
    return product if scaling == 1 else product.mul_(scaling)


def add_product(update: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """update + left @ right, (n, m). In eager code the product adds the update while it stores; compiled code, which
    would copy the update first, adds both in the kernel that reads the sum."""
    if torch.compiler.is_compiling():
        return left @ right + update
    return update.addmm_(left, right)


def own_view(output: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same memory in another shape, as a tensor of its own.

    FSDP2 warns about views, because an in-place op on one would drop its backward hook. Compiled code gets a view:
    inductor sees whether all that follows a sum is pointwise through views only, and else lets the product add it.
    """
    if torch.compiler.is_compiling():
        return output.view(shape)
    return torch.ops.aten._unsafe_view.default(output, shape)
