"""Matrix products with a weight that is rows of bytes: dequantise, multiply, forget.

Two operations, each with its own backward that gets the packed rows and dequantises again:

- `quantized_linear`: `F.linear(x, W, bias)`.
- `lora_linear`: the same plus s (x A^T) B^T, which the large product adds while it stores. Written with PEFT's layers
  the update costs seven passes over the output (product, scale, sum: each reads and writes); here it costs two.

Both exist twice. `torch.compile` gets custom ops, which it does not look into, so that the partitioner cannot decide
to keep a dequantised weight for backward. Eager code gets plain `autograd.Function`s over the same functions, because
a custom op costs tens of microseconds of Python per call, more than many of the kernels it launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_fsdp_qlora.quantization import backend_by_spec


def apply_linear(
    input: Tensor,
    weight: Tensor,
    weight_stats: Tensor,
    bias: Tensor | None,
    spec: str,
    out_features: int,
    in_features: int,
) -> Tensor:
    """`F.linear(input, dequantised weight, bias)` in the dtype of the input; arguments as in `quantized_linear`."""
    args = (input, weight, weight_stats, bias, spec, out_features, in_features)
    return quantized_linear(*args) if torch.compiler.is_compiling() else _Linear.apply(*args)


def apply_lora_linear(
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
    """`apply_linear` plus a LoRA update; arguments as in `lora_linear`."""
    args = (input, weight, weight_stats, bias, lora_a, lora_b, scaling, spec, out_features, in_features)
    return lora_linear(*args)[0] if torch.compiler.is_compiling() else _LoraLinear.apply(*args)


@torch.library.custom_op("hf_fsdp_qlora::quantized_linear", mutates_args=())
def quantized_linear(
    input: Tensor,
    weight: Tensor,
    weight_stats: Tensor,
    bias: Tensor | None,
    spec: str,
    out_features: int,
    in_features: int,
) -> Tensor:
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
    return _linear(input, weight, weight_stats, bias, spec, out_features, in_features)


@torch.library.custom_op("hf_fsdp_qlora::quantized_linear_backward", mutates_args=())
def quantized_linear_backward(
    grad_output: Tensor, weight: Tensor, weight_stats: Tensor, spec: str, out_features: int, in_features: int
) -> Tensor:
    """Gradient of the input of `quantized_linear`: (..., out_features) -> (..., in_features)."""
    return _grad_input(grad_output, weight, weight_stats, spec, out_features, in_features)


@torch.library.custom_op("hf_fsdp_qlora::lora_linear", mutates_args=())
def lora_linear(
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
) -> tuple[Tensor, Tensor]:
    """`F.linear(input, W, bias) + scaling * input A^T B^T` in the dtype of the input.

    Args:
        input, weight, weight_stats, bias, spec: as in `quantized_linear`.
        lora_a: (r, in_features), cast to the dtype of the input.
        lora_b: (out_features, r), likewise.

    Returns:
        (..., out_features), and (tokens, r), the input times A, which backward needs.
    """
    return _lora_linear(input, weight, weight_stats, bias, lora_a, lora_b, scaling, spec, out_features, in_features)


@torch.library.custom_op("hf_fsdp_qlora::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    at_a: Tensor,
    weight: Tensor,
    weight_stats: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    spec: str,
    out_features: int,
    in_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, A and B of `lora_linear`; those of A and B in the dtypes of A and B.

    Args:
        grad_output: (..., out_features).
        at_a: the second output of `lora_linear`.
    """
    return _lora_gradients(
        grad_output, input, at_a, weight, weight_stats, lora_a, lora_b, scaling, spec, out_features, in_features
    )


@quantized_linear.register_fake
def _(input, weight, weight_stats, bias, spec, out_features, in_features):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], out_features)


@quantized_linear_backward.register_fake
def _(grad_output, weight, weight_stats, spec, out_features, in_features):  # type: ignore[no-untyped-def]
    return grad_output.new_empty(*grad_output.shape[:-1], in_features)


@lora_linear.register_fake
def _(  # type: ignore[no-untyped-def]
    input, weight, weight_stats, bias, lora_a, lora_b, scaling, spec, out_features, in_features
):
    tokens = input.numel() // in_features
    return input.new_empty(*input.shape[:-1], out_features), input.new_empty(tokens, lora_a.shape[0])


@lora_linear_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output, input, at_a, weight, weight_stats, lora_a, lora_b, scaling, spec, out_features, in_features
):
    return torch.empty_like(input), torch.empty_like(lora_a), torch.empty_like(lora_b)


def _linear(
    input: Tensor,
    weight: Tensor,
    weight_stats: Tensor,
    bias: Tensor | None,
    spec: str,
    out_features: int,
    in_features: int,
) -> Tensor:
    dense = dequantize_rows(weight, weight_stats, spec, out_features, in_features).to(input.dtype)
    with torch.autocast(input.device.type, enabled=False):
        output = nn.functional.linear(input, dense, None if bias is None else bias.to(input.dtype))
    # With a bias this is a view of a 2-D result, and FSDP2 warns about views: an in-place op on one would drop its
    # backward hook. `_unsafe_view` is the same memory as a tensor of its own.
    return torch.ops.aten._unsafe_view(output, output.shape)


def _grad_input(
    grad_output: Tensor, weight: Tensor, weight_stats: Tensor, spec: str, out_features: int, in_features: int
) -> Tensor:
    dense = dequantize_rows(weight, weight_stats, spec, out_features, in_features).to(grad_output.dtype)
    with torch.autocast(grad_output.device.type, enabled=False):
        return grad_output @ dense


def _lora_linear(
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
) -> tuple[Tensor, Tensor]:
    dtype = input.dtype
    rows = input.reshape(-1, in_features)
    dense = dequantize_rows(weight, weight_stats, spec, out_features, in_features).to(dtype)
    with torch.autocast(input.device.type, enabled=False):
        at_a = rows @ lora_a.to(dtype).t()
        # The update first: the large product adds it while it stores, where the reverse would pass over all twice.
        if bias is None:
            output = (at_a @ lora_b.to(dtype).t()).addmm_(rows, dense.t(), beta=scaling)
        else:
            output = torch.addmm(bias.to(dtype), at_a, lora_b.to(dtype).t(), alpha=scaling).addmm_(rows, dense.t())
    return torch.ops.aten._unsafe_view(output, (*input.shape[:-1], out_features)), at_a


def _lora_gradients(
    grad_output: Tensor,
    input: Tensor,
    at_a: Tensor,
    weight: Tensor,
    weight_stats: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    spec: str,
    out_features: int,
    in_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = input.dtype
    rows, grad = input.reshape(-1, in_features), grad_output.reshape(-1, out_features)
    dense = dequantize_rows(weight, weight_stats, spec, out_features, in_features).to(dtype)
    with torch.autocast(input.device.type, enabled=False):
        grad_at_a = grad @ lora_b.to(dtype)
        grad_input = (grad_at_a @ lora_a.to(dtype)).addmm_(grad, dense, beta=scaling)
        del dense
        grad_a = (grad_at_a.t() @ rows).to(lora_a.dtype).mul_(scaling)
        grad_b = (grad.t() @ at_a).to(lora_b.dtype).mul_(scaling)
    return grad_input.view(input.shape), grad_a, grad_b


def dequantize_rows(weight: Tensor, weight_stats: Tensor, spec: str, out_features: int, in_features: int) -> Tensor:
    """(out_features, in_features) in the backend's dtype, from rows in any storage dtype."""
    codes, stats = as_bytes(weight.detach()), as_bytes(weight_stats.detach())
    return backend_by_spec(spec).dequantize(codes, stats, (out_features, in_features))


def as_bytes(rows: Tensor) -> Tensor:
    """(num_rows, k) in any dtype -> (num_rows, k * itemsize) uint8, the same memory."""
    return rows.view(torch.uint8)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, weight, weight_stats, bias, *ctx.weight_shape = inputs
    ctx.save_for_backward(weight, weight_stats)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _save_lora_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, weight, weight_stats, _, lora_a, lora_b, ctx.scaling, *ctx.weight_shape = inputs
    ctx.save_for_backward(input, output[1], weight, weight_stats, lora_a, lora_b)
    ctx.set_materialize_grads(False)  # nobody uses the second output


def _linear_backward(
    ctx: Any, grad_output: Tensor, product: Callable[..., Tensor] = quantized_linear_backward
) -> tuple[Any, ...]:
    weight, weight_stats = ctx.saved_tensors
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = product(grad_output, weight, weight_stats, *ctx.weight_shape)
    if ctx.needs_input_grad[3]:
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_input, None, None, grad_bias, None, None, None


def _lora_linear_backward(
    ctx: Any, grad_output: Tensor, _: Any = None, products: Callable[..., Any] = lora_linear_backward
) -> tuple[Any, ...]:
    input, at_a, weight, weight_stats, lora_a, lora_b = ctx.saved_tensors
    grad_input, grad_a, grad_b = products(
        grad_output, input, at_a, weight, weight_stats, lora_a, lora_b, ctx.scaling, *ctx.weight_shape
    )
    return grad_input, None, None, None, grad_a, grad_b, None, None, None, None


quantized_linear.register_autograd(_linear_backward, setup_context=_save_linear)
lora_linear.register_autograd(_lora_linear_backward, setup_context=_save_lora_linear)


class _Linear(torch.autograd.Function):
    """`quantized_linear` for eager code."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _save_linear(ctx, args, None)
        return _linear(*args)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _linear_backward(ctx, grad_output, _grad_input)


class _LoraLinear(torch.autograd.Function):
    """`lora_linear` for eager code."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        output = _lora_linear(*args)
        _save_lora_linear(ctx, args, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _lora_linear_backward(ctx, grad_output, products=_lora_gradients)
