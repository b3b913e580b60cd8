"""One Triton kernel from the rows of several 4-bit layers to one weight that multiplies their LoRA adapters too.

Layers that read the same input (query, key and value; gate and up) can share one product: their weights stand one
below the other, and the columns behind them hold the layers' B, each where its own x A^T will be:

    [x | x Aq^T | x Ak^T] [ Wq  Bq  0 ]^T  =  [ x Wq^T + (x Aq^T) Bq^T | x Wk^T + (x Ak^T) Bk^T ]
                          [ Wk  0   Bk]

This kernel writes that weight in one launch, for code that is traced: each value bit-identical to what
`four_bit_kernel` writes, and B as it is. Everything about shapes is a constant of the compiled kernel: a model has two
or three such groups, all layers alike.

Left out: more than `MAX_MEMBERS` layers, and shapes where a block of weights could begin in one row of the weight and
end in the next (`plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fsdp_qlora.formats import NESTED_BLOCKS, WideShape, four_bit_rows
from hf_fsdp_qlora.quantization.four_bit_kernel import CHUNK_WEIGHTS, tables_of, triton

MAX_MEMBERS = 3
_TILE = 4096
"""Values of B, zeros beside it included, that one program writes."""


@dataclass(frozen=True)
class Plan:
    """How the kernel writes one shape.

    Attributes:
        constants: of the compiled kernel, in order, but for the last.
        grid: programs.
    """

    constants: tuple[Any, ...]
    grid: tuple[int, int, int]


def plan(wide: WideShape, block_size: int, nested: bool) -> Plan | None:
    """How to write such a weight, or None where the kernel cannot: blocks must lie within a row of the weight, rows
    be aligned, and offsets fit into 32 bits.

    Args:
        block_size, nested: as in `four_bit_kernel.dequantize`.
    """
    rows, width = wide.shape
    aligned = wide.in_features % block_size == 0 and wide.columns % 8 == 0 and block_size % 16 == 0
    if not aligned or rows * width >= 2**31 or len(wide.ranks) > MAX_MEMBERS:
        return None
    layout = four_bit_rows(block_size, nested)
    blocks = CHUNK_WEIGHTS // block_size
    chunks = NESTED_BLOCKS // blocks
    padded = 1 << max(wide.columns - 1, 1).bit_length()
    tile_rows = max(1, _TILE // padded)
    of_members = [0] * (4 * MAX_MEMBERS)
    programs = 0
    for index, (out_features, rank) in enumerate(zip(wide.out_features, wide.ranks, strict=True)):
        num_rows = layout.num_rows(out_features * wide.in_features)
        if num_rows * layout.row_size >= 2**31:  # the kernel counts the padding of the last row, too
            return None
        span = num_rows + -(-out_features // (tile_rows * chunks))
        of_members[4 * index : 4 * index + 4] = num_rows, span, out_features, rank
        programs += span
    constants = (
        *of_members, wide.first_column, wide.in_features, wide.columns, padded, tile_rows,
        blocks, block_size // 2, NESTED_BLOCKS, layout.stats_bytes, nested,
    )  # fmt: skip
    return Plan(constants, (programs, chunks, 1))


def write(
    codes: Sequence[Tensor],
    stats: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    wide: WideShape,
    how: Plan,
    *,
    quant_type: str,
    used_with: Tensor,
) -> Tensor:
    """The weight, `wide.shape` in the dtype of B; it must be the current device's, and `prepare`d.

    Args:
        codes: of each member, as in `four_bit_kernel.dequantize`.
        stats: likewise.
        lora_b: (out_features, rank) of each member, contiguous, bfloat16, float16 or float32.
        how: the `plan` of `wide`.
        quant_type, used_with: as in `four_bit_kernel.dequantize`.
    """
    weights = torch.empty(wide.shape, dtype=lora_b[0].dtype, device=codes[0].device)
    tables = tables_of(weights.device)
    _write_wide[how.grid](
        *_of_members(codes, stats, lora_b), tables[quant_type], tables["dynamic"], weights, used_with,
        *how.constants, cuda=weights.is_cuda,
    )  # fmt: skip
    return weights


def _of_members(codes: Sequence[Tensor], stats: Sequence[Tensor], lora_b: Sequence[Tensor]) -> list[Tensor]:
    """The first arguments of the kernel. Members that are not there get the first one's tensors, and no programs."""
    tensors: list[Tensor] = []
    for of_one in zip(codes, stats, lora_b, strict=True):
        tensors += of_one
    return tensors + tensors[:3] * (MAX_MEMBERS - len(codes))


if triton is not None:
    import triton.language as tl

    from hf_fsdp_qlora.quantization.four_bit_kernel import decode

    @triton.jit
    def _write_member(
        codes, stats, lora_b, table, dynamic_map, weights, program,
        num_rows: tl.constexpr, out_features: tl.constexpr, rank: tl.constexpr, first_row: tl.constexpr,
        first_column: tl.constexpr, in_features: tl.constexpr, columns: tl.constexpr, padded: tl.constexpr,
        tile_rows: tl.constexpr, blocks: tl.constexpr, block_bytes: tl.constexpr, row_blocks: tl.constexpr,
        stats_bytes: tl.constexpr, nested: tl.constexpr, cuda: tl.constexpr,
    ):  # fmt: skip  # type: ignore[no-untyped-def]
        """The first `num_rows` programs write blocks of weights, the others tiles of B with the zeros beside it."""
        width: tl.constexpr = in_features + columns
        if program < num_rows:
            block = tl.program_id(1) * blocks + tl.arange(0, blocks)
            values = decode(
                codes, stats, table, dynamic_map, weights, program.to(tl.int64), block,
                block_bytes, row_blocks, stats_bytes, nested, cuda,
            )  # fmt: skip
            start = (program * row_blocks + block) * (2 * block_bytes)
            at = tl.multiple_of((first_row + start // in_features) * width + start % in_features, 8)
            inside = at[:, None] + tl.arange(0, 2 * block_bytes)[None, :]
            is_there = (start < out_features * in_features)[:, None] & (inside >= 0)
            tl.store(weights + inside, values, mask=is_there)
        else:
            tile = (program - num_rows) * tl.num_programs(1) + tl.program_id(1)
            row = tile * tile_rows + tl.arange(0, tile_rows)[:, None]
            column = tl.arange(0, padded)[None, :]
            own = (row < out_features) & (column >= first_column) & (column < first_column + rank)
            own_b = tl.load(lora_b + row * rank + (column - first_column), mask=own, other=0.0)
            beside = (row < out_features) & (column < columns)
            tl.store(weights + (first_row + row) * width + in_features + column, own_b, mask=beside)

    @triton.jit
    def _write_wide(
        codes_0, stats_0, lora_b_0, codes_1, stats_1, lora_b_1, codes_2, stats_2, lora_b_2,
        table, dynamic_map, weights, used_with,
        num_rows_0: tl.constexpr, span_0: tl.constexpr, out_features_0: tl.constexpr, rank_0: tl.constexpr,
        num_rows_1: tl.constexpr, span_1: tl.constexpr, out_features_1: tl.constexpr, rank_1: tl.constexpr,
        num_rows_2: tl.constexpr, span_2: tl.constexpr, out_features_2: tl.constexpr, rank_2: tl.constexpr,
        first_column: tl.constexpr, in_features: tl.constexpr, columns: tl.constexpr, padded: tl.constexpr,
        tile_rows: tl.constexpr, blocks: tl.constexpr, block_bytes: tl.constexpr, row_blocks: tl.constexpr,
        stats_bytes: tl.constexpr, nested: tl.constexpr, cuda: tl.constexpr,
    ):  # fmt: skip  # type: ignore[no-untyped-def]
        """Programs are dealt to the members in order."""
        program = tl.program_id(0)
        if program < span_0:
            _write_member(
                codes_0, stats_0, lora_b_0, table, dynamic_map, weights, program, num_rows_0, out_features_0, rank_0,
                0, first_column, in_features, columns, padded, tile_rows,
                blocks, block_bytes, row_blocks, stats_bytes, nested, cuda,
            )  # fmt: skip
        elif program < span_0 + span_1:
            _write_member(
                codes_1, stats_1, lora_b_1, table, dynamic_map, weights, program - span_0, num_rows_1, out_features_1,
                rank_1, out_features_0, first_column + rank_0, in_features, columns, padded, tile_rows,
                blocks, block_bytes, row_blocks, stats_bytes, nested, cuda,
            )  # fmt: skip
        else:
            _write_member(
                codes_2, stats_2, lora_b_2, table, dynamic_map, weights, program - span_0 - span_1, num_rows_2,
                out_features_2, rank_2, out_features_0 + out_features_1, first_column + rank_0 + rank_1, in_features,
                columns, padded, tile_rows, blocks, block_bytes, row_blocks, stats_bytes, nested, cuda,
            )  # fmt: skip
