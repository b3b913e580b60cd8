"""Rows and bytes: how a quantised weight is laid out so that every row stands alone.

The flattened weight (out x in, row-major) is cut into rows of `row_size` weights. A row carries its codes and all the
statistics needed to dequantise it, so any contiguous run of rows can live on any rank, in any file, without the rest.
The last row is padded with zeros.

Arithmetic only: the backends and the planner share this module, and the planner must not need torch.
"""

from __future__ import annotations

from dataclasses import dataclass

NESTED_BLOCKS = 256  # absmax values under one second-level absmax, fixed by bitsandbytes
FLOAT32_BYTES = 4
BLOCKS_PER_ROW = 64  # of the formats whose blocks need no company: short rows split evenly over many ranks

ONE_PRODUCT_BYTES = 64 * 2**20
"""Dequantised weights of layers that read one input are multiplied at once up to this size; larger ones keep the GPU
busy for longer than a launch takes, and are not made while another is there."""


@dataclass(frozen=True)
class RowFormat:
    """The layout of one row.

    Args:
        row_size: weights in a row.
        code_bytes: bytes of codes in a row, a multiple of 4 (rows are stored as float32 views under FSDP2).
        stats_bytes: bytes of statistics in a row, a multiple of 4.
    """

    row_size: int
    code_bytes: int
    stats_bytes: int

    def __post_init__(self) -> None:
        if self.code_bytes % FLOAT32_BYTES or self.stats_bytes % FLOAT32_BYTES:
            raise ValueError(f"a row must be a whole number of float32 values, got {self}")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, codes and statistics together."""
        return self.code_bytes + self.stats_bytes

    @property
    def bytes_per_weight(self) -> float:
        """Bytes a weight costs once quantised, padding of the last row aside."""
        return self.row_bytes / self.row_size

    def num_rows(self, numel: int) -> int:
        """Rows of a weight with `numel` elements."""
        return -(-numel // self.row_size)

    def num_bytes(self, numel: int) -> int:
        """Bytes of a weight with `numel` elements, padding included."""
        return self.num_rows(numel) * self.row_bytes


def four_bit_rows(block_size: int, nested: bool) -> RowFormat:
    """Rows of bitsandbytes NF4 and FP4: 256 blocks each, so that second-level blocks do not cross rows.

    Args:
        block_size: weights under one absmax.
        nested: the absmax values are quantised again to one byte each (double quantisation); a row then ends in its
            float32 second-level absmax and the float32 offset of the whole tensor.

    Source: QLoRA, arXiv 2305.14314, section 3; bitsandbytes.functional.quantize_4bit.
    """
    row_size = NESTED_BLOCKS * block_size
    stats = NESTED_BLOCKS + 2 * FLOAT32_BYTES if nested else NESTED_BLOCKS * FLOAT32_BYTES
    return RowFormat(row_size=row_size, code_bytes=row_size // 2, stats_bytes=stats)


def int8_rows(block_size: int) -> RowFormat:
    """Rows of blockwise int8, dynamic or linear: a byte per weight and a float32 scale per block.

    Args:
        block_size: weights under one scale.

    Scales are float32 because half of that would save 1.5 % at blocks of 128 and flush blocks of tiny weights
    (below 4e-6) to zero.
    """
    row_size = BLOCKS_PER_ROW * block_size
    return RowFormat(row_size=row_size, code_bytes=row_size, stats_bytes=BLOCKS_PER_ROW * FLOAT32_BYTES)


def dense_rows(weight_bytes: int) -> RowFormat:
    """Rows of weights that are not quantised, as many to a row as int8 has in blocks of 128.

    Args:
        weight_bytes: bytes of a weight, 2 or 4.
    """
    row_size = BLOCKS_PER_ROW * 128
    return RowFormat(row_size=row_size, code_bytes=row_size * weight_bytes, stats_bytes=FLOAT32_BYTES)


def hqq_rows(nbits: int, group_size: int, scale_bytes: int) -> RowFormat:
    """Rows of HQQ: codes of exactly `nbits` bits (hqq itself spends 3.2 on 3), then a scale and a zero per group.

    Args:
        nbits: bits of a code, 8, 4, 3 or 2.
        group_size: weights under one scale and zero, a multiple of 8.
        scale_bytes: bytes of a scale, and of a zero.
    """
    row_size = BLOCKS_PER_ROW * group_size
    return RowFormat(row_size=row_size, code_bytes=row_size * nbits // 8, stats_bytes=2 * BLOCKS_PER_ROW * scale_bytes)


def shard_range(num_items: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and past-the-last item that one rank owns when dim 0 is split as `torch.chunk` splits it.

    FSDP2, DCP and `Shard(0)` all use this rule: equal chunks of ceil(n / world_size), the last ones short or empty.
    """
    chunk = -(-num_items // world_size)
    start = min(rank * chunk, num_items)
    return start, min(start + chunk, num_items)


@dataclass(frozen=True)
class WideShape:
    """The shape of a weight with columns for B.

    Attributes:
        in_features: of every member.
        out_features: of each member.
        ranks: of each member's adapter.
        columns: behind the weights; the ranks of all layers that share the input, of which these may be some.
        first_column: where, among these columns, the first member's B begins.
    """

    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]
    columns: int
    first_column: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(all out_features, in_features + columns)."""
        return sum(self.out_features), self.in_features + self.columns

    def members(self) -> list[tuple[int, int, int, int]]:
        """(first row, first column, out_features, rank) of each member."""
        placed, row, column = [], 0, self.first_column
        for out_features, rank in zip(self.out_features, self.ranks, strict=True):
            placed.append((row, column, out_features, rank))
            row, column = row + out_features, column + rank
        return placed
