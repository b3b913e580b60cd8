"""Two 8-bit formats: a byte per weight, a float32 scale per block, nothing shared over the tensor.

Dynamic int8 is bit-identical to `bitsandbytes.functional.quantize_blockwise`. Linear int8 is plain arithmetic, the
same bits on every device: the scale is absmax * (1 / 127), a product, because torch divides by a number on the CPU and
multiplies by its reciprocal on CUDA.

As blocks need no company, `quantize` can be called on any run of rows at any time: a trainer that keeps a master copy
requantises rows in place with it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.formats import BLOCKS_PER_ROW, int8_rows
from hf_fsdp_qlora.quantization.base import GatherRows, QuantizationBackend, in_rows, register_backend
from hf_fsdp_qlora.quantization.bitsandbytes import dynamic_map

DYNAMIC_BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes' CUDA kernel has."""
LARGEST_CODE = 127


class Int8Backend(QuantizationBackend):
    """What the two formats share: rows of `BLOCKS_PER_ROW` blocks, codes and float32 scales.

    Args:
        block_size: weights under one scale.
        dtype: the dtype of the weights and of the matrix product.
    """

    name: ClassVar[str]

    def __init__(self, *, block_size: int, dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ConfigError(f"dtype={dtype} cannot be quantised to int8; use bfloat16, float16 or float32.")
        self.block_size = block_size
        self.dtype = self.compute_dtype = dtype
        self.format = int8_rows(block_size)
        self.spec = f"{self.name}/block={block_size}/{dtype}"

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype) -> Int8Backend:
        """Read `DynamicInt8Config` or `LinearInt8Config`."""
        return cls(block_size=config.block_size, dtype=dtype)

    def quantize(self, weights: Tensor, numel: int, gather_rows: GatherRows) -> tuple[Tensor, Tensor]:
        """See `QuantizationBackend.quantize`. Never collective."""
        rows = self.format.num_rows(weights.numel())
        if not rows:
            empty = weights.new_empty(0, dtype=torch.uint8)
            return empty.view(0, self.format.code_bytes), empty.view(0, self.format.stats_bytes)
        codes, scales = self._encode(weights)
        codes = in_rows(codes, rows, self.format.code_bytes)
        return codes, in_rows(scales, rows, BLOCKS_PER_ROW).view(torch.uint8)

    @abstractmethod
    def _encode(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) in `dtype` -> codes, uint8, at least (n,), and the scale of every block, (blocks,) float32."""


class DynamicInt8Backend(Int8Backend):
    """bitsandbytes' blockwise dynamic 8-bit type."""

    name = "bitsandbytes_dynamic_int8"

    def __init__(self, *, block_size: int, dtype: torch.dtype) -> None:
        if block_size not in DYNAMIC_BLOCK_SIZES:
            raise ConfigError(
                f"block_size={block_size} is not one that bitsandbytes has; use one of {DYNAMIC_BLOCK_SIZES}."
            )
        super().__init__(block_size=block_size, dtype=dtype)

    def dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int]) -> Tensor:
        """See `QuantizationBackend.dequantize`. The same kernel call as bitsandbytes."""
        numel = shape[0] * shape[1]
        return torch.ops.bitsandbytes.dequantize_blockwise(
            codes.view(-1)[:numel].view(shape),
            stats.view(torch.float32).view(-1)[: -(-numel // self.block_size)],
            dynamic_map(codes.device),
            self.block_size,
            self.dtype,
        )

    def _encode(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        codes, state = bnb.quantize_blockwise(weights, code=dynamic_map(weights.device), blocksize=self.block_size)
        return codes, state.absmax


class LinearInt8Backend(Int8Backend):
    """Symmetric int8 with a float32 scale per block."""

    name = "linear_int8"

    def __init__(self, *, block_size: int, dtype: torch.dtype) -> None:
        if block_size < 1:
            raise ConfigError(f"block_size={block_size} must be a positive number of weights.")
        super().__init__(block_size=block_size, dtype=dtype)

    def dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int]) -> Tensor:
        """See `QuantizationBackend.dequantize`. The product is float32, rounded once to `dtype`."""
        blocks = codes.view(torch.int8).view(-1, self.block_size)
        weights = torch.empty(blocks.shape, dtype=self.dtype, device=codes.device)
        torch.mul(blocks, stats.view(torch.float32).view(-1, 1), out=weights)
        return weights.view(-1)[: shape[0] * shape[1]].view(shape)

    def _encode(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        num_blocks = -(-weights.numel() // self.block_size)
        blocks = in_rows(weights, num_blocks, self.block_size).float()
        scales = blocks.abs().amax(dim=1, keepdim=True) * (1 / LARGEST_CODE)
        # A block of zeros has scale 0: divide by 1 instead. Scales near float32's end may round down: clamp.
        codes = (blocks / torch.where(scales > 0, scales, 1.0)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
        return codes.to(torch.int8).view(torch.uint8).view(-1), scales.view(-1)


register_backend(DynamicInt8Backend.name, DynamicInt8Backend)
register_backend(LinearInt8Backend.name, LinearInt8Backend)
