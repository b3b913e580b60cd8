"""Rows that hold the weights themselves: nothing is quantised, and everything that splits rows can split them.

The codes are the bytes of the weights in the model's dtype, so `dequantize` is a view of the rows and costs nothing.
A row has four bytes of statistics, all zero, because FSDP2 forgets how many rows a parameter without columns has.

Bytes are as safe as those of other formats, and finite weights more so: two of them never look like a float32 NaN.

For rotary training with `frozen="bf16"`, where FSDP2 shards what is parked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.formats import dense_rows
from hf_fsdp_qlora.quantization.base import GatherRows, QuantizationBackend, in_rows, register_backend


class DenseBackend(QuantizationBackend):
    """Weights as they are.

    Args:
        dtype: the dtype of the weights and of the matrix product.
    """

    name = "dense"

    def __init__(self, *, dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ConfigError(f"dtype={dtype} cannot be kept in rows; use bfloat16, float16 or float32.")
        self.dtype = self.compute_dtype = dtype
        self.format = dense_rows(dtype.itemsize)
        self.spec = f"{self.name}/{dtype}"

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype) -> DenseBackend:
        """Read `DenseConfig`."""
        return cls(dtype=dtype)

    def quantize(self, weights: Tensor, numel: int, gather_rows: GatherRows) -> tuple[Tensor, Tensor]:
        """See `QuantizationBackend.quantize`. A copy; never collective."""
        num_rows = self.format.num_rows(weights.numel())
        codes = in_rows(weights, num_rows, self.format.row_size).view(torch.uint8)
        return codes, codes.new_zeros(num_rows, self.format.stats_bytes)

    def dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int]) -> Tensor:
        """See `QuantizationBackend.dequantize`. A view of the codes."""
        return codes.view(-1).view(self.dtype)[: shape[0] * shape[1]].view(shape)

    def traced_dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int], used_with: Tensor) -> Tensor:
        """A view is nothing that a compiler could keep, and a custom operation may not return one."""
        return self.dequantize(codes, stats, shape)


register_backend(DenseBackend.name, DenseBackend)
