"""A linear layer whose frozen weight is rows of bytes.

`QuantizedLinear` owns two frozen parameters, `weight` (codes) and `weight_stats` (statistics), both (num_rows, k):
nothing hidden, nothing that a framework may strip, and dim 0 can be split anywhere. The matrix product is a custom op
that dequantises, multiplies and forgets: backward gets the packed rows and dequantises again.

The rows must never be cast. `storage_dtype` only says how the bytes are viewed (uint8, or a floating dtype where an
engine shards nothing else), and `.to(dtype)`, `.half()` and friends move a `QuantizedLinear` without casting it.

Left out: merging into the rows (it would quantise twice; see `merge_adapter`), and training the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_fsdp_qlora.quantization import QuantizationBackend, backend_by_spec


class QuantizedLinear(nn.Linear):
    """`nn.Linear` over quantised rows. Parameters start on the meta device; the loader allocates and fills them.

    Args:
        in_features: as in `nn.Linear`.
        out_features: as in `nn.Linear`.
        bias: whether there is a bias; it stays in the backend's `dtype`.
        backend: the format.
        storage_dtype: the dtype under which the bytes are stored. A view: the bytes are the same.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        backend: QuantizationBackend,
        storage_dtype: torch.dtype = torch.uint8,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.backend = backend
        self.num_rows = backend.format.num_rows(in_features * out_features)
        self.weight = _empty_rows(self.num_rows, backend.format.code_bytes, storage_dtype)
        self.weight_stats = _empty_rows(self.num_rows, backend.format.stats_bytes, storage_dtype)
        if bias:
            empty = torch.empty(out_features, dtype=backend.dtype, device="meta")
            self.bias = nn.Parameter(empty, requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self.row_fingerprints: Tensor | None = None  # (num_rows,) int64 on the host, set by the loader
        # Set where the parameters above are not the rows all the time (FSDP1).
        self.fetch_rows: Callable[[], AbstractContextManager[tuple[Tensor, Tensor]]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight that the rows stand for."""
        return self.backend.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrix product outside autocast."""
        return self.backend.compute_dtype

    def forward(self, input: Tensor, *, add_bias: bool = True) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of the input.

        Args:
            add_bias: False leaves the bias to the caller (DoRA scales the product without it).
        """
        device_type = input.device.type
        autocast = torch.is_autocast_enabled(device_type)
        compute_dtype = torch.get_autocast_dtype(device_type) if autocast else self.compute_dtype
        output = quantized_linear(
            input.to(compute_dtype), self.weight, self.weight_stats, self.bias if add_bias else None,
            self.backend.spec, self.out_features, self.in_features,
        )  # fmt: skip
        return output.to(input.dtype)

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features) in `dtype`.

        Collective while the rows are sharded: call it on every rank.
        """
        with self._whole_rows() as (codes, stats):
            return _dequantize(codes, stats, self.backend.spec, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.backend.spec}"

    def reset_parameters(self) -> None:
        """Nothing to do: rows come from a checkpoint. (`nn.Linear` would fill them with random numbers.)"""

    @contextmanager
    def _whole_rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.fetch_rows is None:
            yield _whole(self.weight), _whole(self.weight_stats)
        else:
            with self.fetch_rows() as rows:
                yield rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        packed = {id(self.weight), id(self.weight_stats)}

        def keep_bytes(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if id(tensor) in packed and applied.dtype != tensor.dtype:
                return tensor.to(applied.device)
            return applied

        return super()._apply(keep_bytes, recurse)


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
    dense = _dequantize(weight, weight_stats, spec, out_features, in_features).to(input.dtype)
    with torch.autocast(input.device.type, enabled=False):
        output = nn.functional.linear(input, dense, None if bias is None else bias.to(input.dtype))
    # With a bias this is a view of a 2-D result, and FSDP2 warns about views: an in-place op on one would drop its
    # backward hook. `_unsafe_view` is the same memory as a tensor of its own.
    return torch.ops.aten._unsafe_view(output, output.shape)


@quantized_linear.register_fake
def _(input, weight, weight_stats, bias, spec, out_features, in_features):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], out_features)


@torch.library.custom_op("hf_fsdp_qlora::quantized_linear_backward", mutates_args=())
def quantized_linear_backward(
    grad_output: Tensor, weight: Tensor, weight_stats: Tensor, spec: str, out_features: int, in_features: int
) -> Tensor:
    """Gradient of the input of `quantized_linear`: (..., out_features) -> (..., in_features)."""
    dense = _dequantize(weight, weight_stats, spec, out_features, in_features).to(grad_output.dtype)
    with torch.autocast(grad_output.device.type, enabled=False):
        return grad_output @ dense


@quantized_linear_backward.register_fake
def _(grad_output, weight, weight_stats, spec, out_features, in_features):  # type: ignore[no-untyped-def]
    return grad_output.new_empty(*grad_output.shape[:-1], in_features)


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, weight, weight_stats, bias, ctx.spec, ctx.out_features, ctx.in_features = inputs
    ctx.save_for_backward(weight, weight_stats)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_output):  # type: ignore[no-untyped-def]
    weight, weight_stats = ctx.saved_tensors
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = quantized_linear_backward(
            grad_output, weight, weight_stats, ctx.spec, ctx.out_features, ctx.in_features
        )
    if ctx.needs_input_grad[3]:
        grad_bias = grad_output.reshape(-1, ctx.out_features).sum(0).to(ctx.bias_dtype)
    return grad_input, None, None, grad_bias, None, None, None


quantized_linear.register_autograd(_backward, setup_context=_save_for_backward)


def _dequantize(weight: Tensor, weight_stats: Tensor, spec: str, out_features: int, in_features: int) -> Tensor:
    codes, stats = as_bytes(weight.detach()), as_bytes(weight_stats.detach())
    return backend_by_spec(spec).dequantize(codes, stats, (out_features, in_features))


def as_bytes(rows: Tensor) -> Tensor:
    """(num_rows, k) in any dtype -> (num_rows, k * itemsize) uint8, the same memory."""
    return rows.view(torch.uint8)


def _empty_rows(num_rows: int, row_bytes: int, storage_dtype: torch.dtype) -> nn.Parameter:
    width = row_bytes // storage_dtype.itemsize
    return nn.Parameter(torch.empty(num_rows, width, dtype=storage_dtype, device="meta"), requires_grad=False)


def _whole(parameter: Tensor) -> Tensor:
    """The unsharded tensor; gathers a DTensor, through its mesh's device where the shard lives on the host."""
    if not isinstance(parameter, DTensor):
        return parameter
    local = parameter.to_local().detach().to(parameter.device_mesh.device_type)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()
