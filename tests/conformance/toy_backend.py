"""A sign per weight and half the largest absolute value per row: the worked example of docs/adding_a_backend.md.

Nobody should train on it, but everything a backend needs is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_fsdp_qlora.formats import RowFormat
from hf_fsdp_qlora.quantization import GatherRows, QuantizationBackend, in_rows, register_backend

ROW_SIZE = 1024
SIGNS_PER_BYTE = 8


class SignConfig(QuantizationConfigMixin):
    """What a user passes to `load_model`."""

    def __init__(self, modules_to_not_convert: list[str] | None = None) -> None:
        self.quant_method = "toy_sign"  # type: ignore[assignment]  # the key under which the backend is registered
        self.modules_to_not_convert = modules_to_not_convert


class SignBackend(QuantizationBackend):
    """Signs and one magnitude per row. Zero counts as positive."""

    format = RowFormat(row_size=ROW_SIZE, code_bytes=ROW_SIZE // SIGNS_PER_BYTE, stats_bytes=4)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = self.compute_dtype = dtype
        self.spec = f"toy_sign/{dtype}"  # everything that dequantize depends on

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype) -> SignBackend:
        return cls(dtype)

    def quantize(self, weights: Tensor, numel: int, gather_rows: GatherRows) -> tuple[Tensor, Tensor]:
        num_rows = self.format.num_rows(weights.numel())  # 0 on a rank without rows
        rows = in_rows(weights, num_rows, ROW_SIZE)
        magnitudes = rows.float().abs().amax(1) / 2  # the zeros of padding do not count
        bits = (rows >= 0).view(num_rows, self.format.code_bytes, SIGNS_PER_BYTE)
        codes = (bits << torch.arange(SIGNS_PER_BYTE, device=weights.device)).sum(2)
        return codes.to(torch.uint8), magnitudes.view(-1, 1).view(torch.uint8)

    def dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int]) -> Tensor:
        bits = codes[:, :, None] >> torch.arange(SIGNS_PER_BYTE, device=codes.device) & 1
        weights = (bits.view(-1, ROW_SIZE) * 2 - 1) * stats.view(torch.float32)
        return weights.view(-1)[: shape[0] * shape[1]].view(shape).to(self.dtype)


register_backend("toy_sign", SignBackend)
