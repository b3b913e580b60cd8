"""NF4 and FP4 rows, bit-identical to `bitsandbytes.functional.quantize_4bit` of the whole tensor.

Codes and absmax belong to blocks, and a row is a whole number of blocks, so quantising a run of rows gives exactly
the bytes the whole tensor would have there. Double quantisation needs one number of the whole tensor, the mean of
absmax; it is computed from the gathered absmax vector by the same call on the same values as bitsandbytes does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.formats import NESTED_BLOCKS, WideShape, four_bit_rows
from hf_fsdp_qlora.quantization import four_bit_kernel, wide_kernel
from hf_fsdp_qlora.quantization.base import GatherRows, QuantizationBackend, in_rows, register_backend
from hf_fsdp_qlora.quantization.configs import BlockwiseFourBitConfig

logger = logging.getLogger(__name__)

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCK_SIZE = 64


class FourBitBackend(QuantizationBackend):
    """bitsandbytes NF4 or FP4.

    Args:
        quant_type: "nf4" or "fp4".
        block_size: weights under one absmax, one of `BLOCK_SIZES`.
        nested: quantise the absmax values too (double quantisation).
        dtype: the dtype of the weights.
        compute_dtype: the dtype of the matrix product.
    """

    trace_kernel: bool = True
    """Whether compiled code launches our kernel itself; a class attribute to switch it off for a comparison."""

    def __init__(
        self, quant_type: str, *, block_size: int, nested: bool, dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> None:
        if quant_type not in ("nf4", "fp4"):
            raise ConfigError(f"bnb_4bit_quant_type={quant_type!r} is unknown; use 'nf4' or 'fp4'.")
        if block_size not in BLOCK_SIZES:
            raise ConfigError(f"block_size={block_size} is not one that bitsandbytes has; use one of {BLOCK_SIZES}.")
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ConfigError(f"dtype={dtype} cannot be quantised to 4 bit; use bfloat16, float16 or float32.")
        self.quant_type = quant_type
        self.block_size = block_size
        self.nested = nested
        self.dtype = dtype
        self.compute_dtype = compute_dtype
        self.format = four_bit_rows(block_size, nested)
        self.spec = f"bitsandbytes/{quant_type}/block={block_size}/nested={nested}/{dtype}/{compute_dtype}"

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype) -> FourBitBackend:
        """Read transformers' `BitsAndBytesConfig`, or our `BlockwiseFourBitConfig` for other block sizes.

        `bnb_4bit_compute_dtype` cannot be told from its default, float32; the default means `dtype`.
        """
        if not config.load_in_4bit:
            raise ConfigError(
                "BitsAndBytesConfig without load_in_4bit has no row format (LLM.int8 keeps outlier columns, which do "
                "not stand alone). Set load_in_4bit=True, or use LinearInt8Config for 8 bits."
            )
        wanted = config.bnb_4bit_compute_dtype
        return cls(
            config.bnb_4bit_quant_type,
            block_size=config.bnb_4bit_blocksize if isinstance(config, BlockwiseFourBitConfig) else DEFAULT_BLOCK_SIZE,
            nested=config.bnb_4bit_use_double_quant,
            dtype=dtype,
            compute_dtype=dtype if wanted in (None, torch.float32) else wanted,
        )

    @classmethod
    def skip_modules(cls, config: Any) -> list[str] | None:
        """`llm_int8_skip_modules`, which in spite of its name holds for 4 bit too."""
        return config.llm_int8_skip_modules

    def quantize(self, weights: Tensor, numel: int, gather_rows: GatherRows) -> tuple[Tensor, Tensor]:
        """See `QuantizationBackend.quantize`. Collective once per tensor with double quantisation, else local."""
        rows = self.format.num_rows(weights.numel())
        if rows:
            # The op behind `bnb.quantize_4bit`, which copies a table to the device for every tensor.
            codes, absmax = torch.ops.bitsandbytes.quantize_4bit(
                weights, self.block_size, self.quant_type, torch.uint8
            )
            codes = codes.view(-1)
        else:  # bitsandbytes' kernels do not take empty tensors
            codes, absmax = weights.new_empty(0, dtype=torch.uint8), weights.new_empty(0, dtype=torch.float32)
        codes = in_rows(codes, rows, self.format.code_bytes)
        if not self.nested:
            return codes, in_rows(absmax.view(torch.uint8), rows, self.format.stats_bytes)
        num_blocks = -(-numel // self.block_size)
        whole_absmax = gather_rows(in_rows(absmax, rows, NESTED_BLOCKS)).flatten()[:num_blocks]
        offset = whole_absmax.mean()
        if not rows:
            return codes, codes.new_empty(0, self.format.stats_bytes)
        table = dynamic_map(absmax.device)
        absmax_codes, second = torch.ops.bitsandbytes.quantize_blockwise(absmax - offset, table, NESTED_BLOCKS)
        parts = [
            in_rows(absmax_codes, rows, NESTED_BLOCKS),
            second.view(rows, 1).view(torch.uint8),
            offset.repeat(rows, 1).view(torch.uint8),
        ]
        return codes, torch.cat(parts, dim=1)

    def dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int]) -> Tensor:
        """See `QuantizationBackend.dequantize`. One kernel of ours on CUDA, bit-identical to bitsandbytes; elsewhere
        the same kernel call on the same absmax as bitsandbytes."""
        if four_bit_kernel.available(codes):
            if not four_bit_kernel.prepared(codes):
                self.prepare(codes.device)
            with four_bit_kernel.on_device_of(codes):
                return four_bit_kernel.launch(
                    codes, stats, shape, quant_type=self.quant_type, block_size=self.block_size, nested=self.nested,
                    dtype=self.dtype,
                )  # fmt: skip
        return self.reference_dequantize(codes, stats, shape)

    def traced_dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int], used_with: Tensor) -> Tensor:
        """See `QuantizationBackend.traced_dequantize`. On CUDA the kernel itself, for the compiler to launch."""
        if self.trace_kernel and four_bit_kernel.available(codes) and four_bit_kernel.prepared(codes):
            return four_bit_kernel.dequantize(
                codes, stats, shape, quant_type=self.quant_type, block_size=self.block_size, nested=self.nested,
                dtype=self.dtype, used_with=used_with,
            )  # fmt: skip
        return super().traced_dequantize(codes, stats, shape, used_with)

    def joins(self, wide: WideShape) -> bool:
        """See `QuantizationBackend.joins`."""
        return four_bit_kernel.here() and wide_kernel.plan(wide, self.block_size, self.nested) is not None

    def dequantize_wide(
        self,
        codes: Sequence[Tensor],
        stats: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        wide: WideShape,
        used_with: Tensor,
    ) -> Tensor:
        """See `QuantizationBackend.dequantize_wide`. One kernel of ours where `joins` says so."""
        how = wide_kernel.plan(wide, self.block_size, self.nested)
        here = four_bit_kernel.available(codes[0]) and four_bit_kernel.prepared(codes[0])
        if how is None or not here or lora_b[0].dtype != self.dtype:
            return super().dequantize_wide(codes, stats, lora_b, wide, used_with)
        return wide_kernel.write(codes, stats, lora_b, wide, how, quant_type=self.quant_type, used_with=used_with)

    def prepare(self, device: torch.device) -> None:
        """See `QuantizationBackend.prepare`. Says so where bitsandbytes' slower kernels have to do."""
        if device.type == "cuda" and torch.version.hip is None and four_bit_kernel.LACKS is not None:
            logger.warning(
                "Triton cannot launch kernels here: %s. 4-bit weights are dequantised by bitsandbytes' own kernels, "
                "which is slower.", four_bit_kernel.LACKS,
            )  # fmt: skip
        four_bit_kernel.prepare(device, dynamic_map(device))

    def reference_dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int]) -> Tensor:
        """`dequantize` by bitsandbytes' own kernel, on any device."""
        numel = shape[0] * shape[1]
        num_blocks = -(-numel // self.block_size)
        if self.nested:
            absmax = self._absmax(stats)
        else:
            absmax = stats.view(torch.float32)
        return torch.ops.bitsandbytes.dequantize_4bit(
            codes.view(-1)[: -(-numel // 2)].view(-1, 1),
            absmax.reshape(-1)[:num_blocks],
            self.block_size,
            self.quant_type,
            shape,
            self.dtype,
        )

    def _absmax(self, stats: Tensor) -> Tensor:
        """First-level absmax, (num_rows, 256) float32: table[code] * second-level absmax + offset, in that order and
        without fusing, as bitsandbytes rounds it."""
        codes, levels = stats[:, :NESTED_BLOCKS].contiguous(), stats[:, NESTED_BLOCKS:].contiguous()
        second, offset = levels.view(torch.float32).split(1, dim=1)
        scaled = torch.ops.bitsandbytes.dequantize_blockwise(
            codes, second.contiguous(), dynamic_map(stats.device), NESTED_BLOCKS, torch.float32
        )
        return scaled.add_(offset)


_DYNAMIC_MAPS: dict[torch.device, Tensor] = {}


def dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' 256-entry table for 8-bit blockwise codes, float32, cached per device."""
    if device not in _DYNAMIC_MAPS:
        _DYNAMIC_MAPS[device] = bnb.create_dynamic_map().to(device)
    return _DYNAMIC_MAPS[device]


register_backend("bitsandbytes", FourBitBackend)
