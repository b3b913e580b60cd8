"""A linear layer whose frozen weight is rows of bytes.

`QuantizedLinear` owns two frozen parameters, `weight` (codes) and `weight_stats` (statistics), both (num_rows, k):
nothing hidden, nothing that a framework may strip, and dim 0 can be split anywhere. The matrix product (row_ops.py)
dequantises, multiplies and forgets: backward gets the packed rows and dequantises again.

The rows must never be cast. `storage_dtype` only says how the bytes are viewed (uint8, or a floating dtype where an
engine shards nothing else), and `.to(dtype)`, `.half()` and friends move a `QuantizedLinear` without casting it.

Rotary training gives a layer a third parameter, `dense`: the weight itself, empty while the rows stand for it. While
it is filled the layer is an ordinary `nn.Linear` over it, and its rows are not read.

Left out: merging into the rows (it would quantise twice; see `merge_adapter`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_fsdp_qlora.quantization import QuantizationBackend
from hf_fsdp_qlora.row_ops import apply_linear, apply_lora_linear, as_bytes


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
        self.register_parameter("dense", None)
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

    def forward(
        self, input: Tensor, *, add_bias: bool = True, lora: tuple[Tensor, Tensor, float] | None = None
    ) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of the input.

        Args:
            add_bias: False leaves the bias to the caller (DoRA scales the product without it).
            lora: A (r, in_features), B (out_features, r) and the scaling of an update to add, which is computed in
                the dtype of the product. Not with a bias that is trained.
        """
        bias = self.bias if add_bias else None
        if self.dense is not None and self.dense.numel():
            return nn.functional.linear(input, self.dense, bias)
        dtype = self.product_dtype(input.device.type)
        rows = (input.to(dtype), self.weight, self.weight_stats, bias)
        weight = (self.backend.spec, self.out_features, self.in_features)
        output = apply_linear(*rows, *weight) if lora is None else apply_lora_linear(*rows, *lora, *weight)
        return output.to(input.dtype)

    def product_dtype(self, device_type: str) -> torch.dtype:
        """The dtype of the matrix product now: autocast's inside autocast, else `compute_dtype`."""
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.compute_dtype

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features) in `dtype`.

        Memory of its own. Collective while the rows are sharded: call it on every rank.
        """
        if self.dense is not None and self.dense.numel():
            return self.dense.detach().clone()
        with self._whole_rows() as (codes, stats):
            codes, stats = as_bytes(codes.detach()), as_bytes(stats.detach())
            weight = self.backend.dequantize(codes, stats, (self.out_features, self.in_features))
            is_view = weight.untyped_storage().data_ptr() == codes.untyped_storage().data_ptr()
            return weight.clone() if is_view else weight

    def add_dense(self, device: torch.device) -> nn.Parameter:
        """Register the weight itself as a parameter, empty, and let the bias be trained too.

        Parameters keep the order of `nn.Linear` (weight before bias): clipping sums their norms in order.
        """
        self.dense = nn.Parameter(torch.empty(0, dtype=self.dtype, device=device))
        self._parameters["bias"] = self._parameters.pop("bias")
        return self.dense

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
