"""HQQ rows: quantised by the hqq library on the whole tensor, then repacked so that every row stands alone.

hqq's solver stops early on the error over the whole tensor, so parts quantised apart would differ from the whole; and
its packing puts weights from distant groups into one byte. Here the solver runs once per tensor, unchanged (float32 on
the CPU, float16 on CUDA), and only its unpacked codes, scales and zeros are taken. A row is 64 groups: their codes,
their scales and their zeros in `dtype`, which is the precision that hqq keeps them in.

A code of 3 bits is stored as a plane of 2-bit parts and a plane of 1-bit parts, exactly 3 bits; hqq packs ten codes
into an int32.

hqq sees the flattened weight as a matrix of groups. Along axis 1 a group is a run of weights. Along axis 0 it is a
column, weights a tensor's length / group_size apart; a row then holds 64 neighbouring columns, and dequantising puts
the rows side by side.

Left out: scales that are quantised in turn, which hqq has deprecated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.formats import BLOCKS_PER_ROW, hqq_rows
from hf_fsdp_qlora.quantization.base import GatherRows, QuantizationBackend, in_rows, register_backend

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""Widths of the bit planes that make up a code, the low bits first."""


class HqqBackend(QuantizationBackend):
    """Half-quadratic quantisation.

    Args:
        nbits: one of `PLANES`.
        group_size: weights under one scale and zero, a multiple of 8.
        axis: 1 for groups of neighbouring weights, 0 for groups across the tensor, which hqq finds more exact and
            which cost a transposition whenever the weight is used.
        dtype: the dtype of weights, scales, zeros and the matrix product.

    Source: https://mobiusml.github.io/hqq_blog/
    """

    whole_tensor = True

    def __init__(self, *, nbits: int, group_size: int, axis: int, dtype: torch.dtype) -> None:
        if nbits not in PLANES:
            raise ConfigError(f"HqqConfig(nbits={nbits}) has no row format; use one of {', '.join(map(str, PLANES))}.")
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ConfigError(f"dtype={dtype} cannot be quantised by hqq; use bfloat16, float16 or float32.")
        self.nbits = nbits
        self.group_size = group_size
        self.axis = axis
        self.dtype = self.compute_dtype = dtype
        self.format = hqq_rows(nbits, group_size, dtype.itemsize)
        self.spec = f"hqq/nbits={nbits}/group={group_size}/axis={axis}/{dtype}"

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype) -> HqqBackend:
        """Read transformers' `HqqConfig`. `view_as_float` has no effect: the engine chooses how bytes are viewed.

        Raises:
            ConfigError: hqq is not installed, or settings differ between layers, or the group size is not a number.
        """
        _hqq()
        if "weight_quant_params" not in config.quant_config:
            raise ConfigError(
                f"HqqConfig(dynamic_config=...) with settings for {', '.join(config.quant_config)} cannot be kept, "
                "as all layers share one row format. Use nbits= and group_size=, and skip_modules= for layers to keep."
            )
        settings = config.quant_config["weight_quant_params"]
        if settings["group_size"] is None:
            raise ConfigError(
                "HqqConfig(group_size=None) makes groups as wide as each layer, but all layers share one row format. "
                "Use a number, such as 64."
            )
        return cls(nbits=settings["nbits"], group_size=settings["group_size"], axis=settings["axis"], dtype=dtype)

    @classmethod
    def skip_modules(cls, config: Any) -> list[str] | None:
        """`HqqConfig.skip_modules`."""
        return config.skip_modules

    def check_weight(self, name: str, shape: tuple[int, int]) -> None:
        """hqq takes whole groups only."""
        if shape[0] * shape[1] % self.group_size:
            raise ConfigError(
                f"{name} of shape {shape} is not a whole number of groups of {self.group_size}. Use another "
                f"group_size, or add {name.split('.')[-1]!r} to skip_modules."
            )

    def quantize(self, weights: Tensor, numel: int, gather_rows: GatherRows) -> tuple[Tensor, Tensor]:
        """See `QuantizationBackend.quantize`. Needs the whole tensor; never collective."""
        assert weights.numel() == numel, "hqq needs the whole tensor"
        quantizer, settings = _hqq()
        codes, meta = quantizer.quantize(
            weights.view(1, -1),  # groups follow from the flattened weight alone
            device=weights.device,
            compute_dtype=self.dtype,
            bitpack=False,
            **settings(nbits=self.nbits, group_size=self.group_size, axis=self.axis)["weight_quant_params"],
        )
        rows = self.format.num_rows(numel)
        stats = [in_rows(meta[key].to(self.dtype).view(-1), rows, BLOCKS_PER_ROW) for key in ("scale", "zero")]
        codes = codes.to(torch.uint8)
        if self.axis == 1:
            codes = in_rows(codes.view(-1), rows, self.format.row_size)
        else:
            columns = codes.view(self.group_size, -1)
            columns = pad(columns, (0, rows * BLOCKS_PER_ROW - columns.shape[1]))
            codes = columns.view(self.group_size, rows, BLOCKS_PER_ROW).transpose(0, 1).reshape(rows, -1)
        return pack_codes(codes, self.nbits), torch.cat(stats, dim=1).view(torch.uint8)

    def dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int]) -> Tensor:
        """See `QuantizationBackend.dequantize`. (code - zero) * scale, each step rounded to `dtype`, as hqq does."""
        numel, unpacked = shape[0] * shape[1], unpack_codes(codes, self.nbits)
        scales, zeros = stats.view(self.dtype).view(-1, 2, BLOCKS_PER_ROW).unbind(1)
        if self.axis == 1:
            groups = unpacked.view(-1, BLOCKS_PER_ROW, self.group_size)
            weights = torch.sub(groups, zeros[:, :, None]).mul_(scales[:, :, None])
            return weights.view(-1)[:numel].view(shape)
        groups = unpacked.view(-1, self.group_size, BLOCKS_PER_ROW)
        weights = torch.sub(groups, zeros[:, None]).mul_(scales[:, None])
        columns = weights.transpose(0, 1).reshape(self.group_size, -1)
        return columns[:, : numel // self.group_size].reshape(shape)


def pack_codes(codes: Tensor, nbits: int) -> Tensor:
    """Pack codes into bit planes, row by row.

    A plane of width w keeps 8 / w codes in a byte: those of the same place in each of the row's 8 / w equal parts,
    the first part in the high bits. So packing and unpacking move long runs.

    Args:
        codes: (rows, row_size) uint8, below 2**nbits.
        nbits: a key of `PLANES`.

    Returns:
        (rows, row_size * nbits / 8) uint8.
    """
    planes = []
    for shift, width in _shifts(nbits):
        per_byte = 8 // width
        parts = (codes >> shift & (2**width - 1)).view(len(codes), per_byte, -1)
        plane = parts[:, 0]
        for index in range(1, per_byte):
            plane = plane << width | parts[:, index]
        planes.append(plane)
    return torch.cat(planes, dim=1)


def unpack_codes(packed: Tensor, nbits: int) -> Tensor:
    """The reverse of `pack_codes`: (rows, row_size * nbits / 8) uint8 -> (rows, row_size) uint8."""
    rows, row_size = len(packed), packed.shape[1] * 8 // nbits
    codes = torch.empty(rows, row_size, dtype=torch.uint8, device=packed.device)
    start = 0
    for shift, width in _shifts(nbits):
        per_byte = 8 // width
        plane = packed[:, start : start + row_size // per_byte]
        start += row_size // per_byte
        for index, part in enumerate(codes.view(rows, per_byte, -1).unbind(1)):
            bits = plane >> (8 - width * (index + 1)) & (2**width - 1)
            if shift:
                part |= bits << shift
            else:
                part.copy_(bits)
    return codes


def _shifts(nbits: int) -> list[tuple[int, int]]:
    """For every plane, where its bits lie in a code and how many they are."""
    widths = PLANES[nbits]
    return [(sum(widths[:index]), width) for index, width in enumerate(widths)]


def _hqq() -> Any:
    """hqq's quantizer and the function that completes its settings. Imported late: it is an optional extra."""
    try:
        from hqq.core.quantize import BaseQuantizeConfig, Quantizer
    except ImportError as error:
        raise ConfigError(
            "HqqConfig needs the hqq library, which is not installed: pip install hf_fsdp_qlora[hqq]"
        ) from error
    return Quantizer, BaseQuantizeConfig


register_backend("hqq", HqqBackend)
