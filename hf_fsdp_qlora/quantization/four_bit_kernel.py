"""One Triton kernel from 4-bit rows to weights: nested statistics and codes in a single pass.

bitsandbytes needs the absmax values as float32 first, which for double quantisation is five launches of their own
before its kernel runs. Here a program reads a run of codes and the few statistics it needs and writes weights: every
byte moves once (0.52 bytes read and 2 written per weight in bf16), in one launch.

The values are bit-identical to bitsandbytes' on CUDA: absmax = table[code] * second + offset with both operations
rounded, then table[code] * absmax in float32, rounded once to the dtype. The product is written in PTX with its
rounding mode, because compilers fuse `a * b + c` otherwise, also where the product is spelled out in float64. Source:
kDequantizeBlockwise in bitsandbytes' csrc/kernels.cu.

`torch.compile` sees through to the kernel and launches it itself; the tables it reads must be there by then
(`prepare`), because a graph cannot make them. Eager code calls `launch` instead, which remembers what Triton compiled:
Triton's own call inspects every argument each time, which takes longer than most weights take to dequantise.

Triton comes with torch's CUDA builds, and needs a C compiler (triton_build.py). `available` says whether the kernel
can run; bitsandbytes does where it cannot.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_fsdp_qlora.formats import NESTED_BLOCKS
from hf_fsdp_qlora.quantization.triton_build import triton_lacks

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for the CPU come without it
    triton = None

LACKS = triton_lacks()
"""Why no kernel can run, or None; traced code reads it too."""

CHUNK_WEIGHTS = 4096
"""Weights of one program; at least the largest block size, so that a program holds whole blocks."""

# The literals of dDequantizeNF4 and dDequantizeFP4Tree, in the order of the codes. FP4's code 8 is minus zero.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_HALF = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
TABLES = {"nf4": _NF4, "fp4": (*_FP4_HALF, *(-value for value in _FP4_HALF))}


def here() -> bool:
    """Whether the kernel can run on this machine: Triton can, and there is an NVIDIA GPU (it has PTX in it)."""
    return LACKS is None and torch.version.hip is None and torch.cuda.is_available()


def available(codes: Tensor) -> bool:
    """Whether the kernel can run on these codes. Asking CUDA, as `here` does, would take longer than to launch."""
    return LACKS is None and codes.is_cuda and torch.version.hip is None


def on_device_of(codes: Tensor) -> AbstractContextManager[object]:
    """Make the codes' device the current one: Triton launches there, whatever device its arguments are on."""
    if codes.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(codes.device)


def prepare(device: torch.device, dynamic_map: Tensor) -> None:
    """Put the tables on a device.

    Args:
        dynamic_map: (256,) float32, the table of nested codes.
    """
    if device.index not in _TABLES:
        on_device = {name: torch.tensor(table, dtype=torch.float32, device=device) for name, table in TABLES.items()}
        _TABLES[device.index] = on_device | {"dynamic": dynamic_map.to(device)}


def prepared(codes: Tensor) -> bool:
    """Whether the tables are on the device of the codes."""
    return codes.device.index in _TABLES


def tables_of(device: torch.device) -> dict[str, Tensor]:
    """What `prepare` put on a device: "nf4" and "fp4", (16,) float32, and "dynamic", (256,) float32."""
    return _TABLES[device.index]


def dequantize(
    codes: Tensor,
    stats: Tensor,
    shape: tuple[int, int],
    *,
    quant_type: str,
    block_size: int,
    nested: bool,
    dtype: torch.dtype,
    used_with: Tensor,
) -> Tensor:
    """Rows to weights in one launch, for code that is traced (and for Triton's interpreter).

    Args:
        codes: (num_rows, 256 * block_size / 2) uint8, contiguous, two codes a byte, the first in the high nibble.
        stats: (num_rows, 264) uint8 with `nested`: 256 codes, second-level absmax and offset as float32; else
            (num_rows, 1024), 256 float32 absmax values. Contiguous.
        shape: (out_features, in_features); all but the last row are full.
        quant_type: "nf4" or "fp4".
        block_size: weights under one absmax, a power of two of at most `CHUNK_WEIGHTS`.
        nested: whether the absmax values are codes too.
        dtype: bfloat16, float16 or float32.
        used_with: see `QuantizationBackend.traced_dequantize`; the kernel takes it and does not read it.

    `prepare` must have been called for the device, and it must be the current one (`on_device_of`).

    Returns:
        `shape` in `dtype`.
    """
    weights = torch.empty(shape, dtype=dtype, device=codes.device)
    tables = tables_of(codes.device)
    blocks = CHUNK_WEIGHTS // block_size
    _rows_to_weights[(codes.shape[0], NESTED_BLOCKS // blocks)](
        codes, stats, tables[quant_type], tables["dynamic"], weights, used_with,
        shape[0] * shape[1], blocks=blocks, block_bytes=block_size // 2, row_blocks=NESTED_BLOCKS,
        stats_bytes=stats.shape[1], nested=nested, cuda=codes.is_cuda,
    )  # fmt: skip
    return weights


def launch(
    codes: Tensor,
    stats: Tensor,
    shape: tuple[int, int],
    *,
    quant_type: str,
    block_size: int,
    nested: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize` for eager code on CUDA, where the call itself costs: see there for the arguments.

    Triton compiles another kernel for addresses and counts that are no multiples of 16; those few take its own call.
    """
    numel, rows, own_stats = shape[0] * shape[1], codes.data_ptr(), stats.data_ptr()
    regular = (rows | own_stats | numel) % 16 == 0 and numel < 2**31
    key = (codes.device.index, block_size, nested, dtype)
    weights = torch.empty(shape, dtype=dtype, device=codes.device)
    tables = tables_of(codes.device)
    blocks = CHUNK_WEIGHTS // block_size
    grid = (codes.shape[0], NESTED_BLOCKS // blocks, 1)
    constants = (blocks, block_size // 2, NESTED_BLOCKS, stats.shape[1], nested, True)
    compiled = _COMPILED.get(key) if regular else None
    if compiled is not None:  # plain addresses: there is nothing left to find out about the tensors
        tables_at = tables[quant_type].data_ptr(), tables["dynamic"].data_ptr()
        compiled[grid](rows, own_stats, *tables_at, weights.data_ptr(), rows, numel, *constants)
        return weights
    compiled = _rows_to_weights[grid](
        codes, stats, tables[quant_type], tables["dynamic"], weights, codes, numel, *constants
    )
    if regular:
        _COMPILED[key] = compiled
    return weights


_TABLES: dict[int | None, dict[str, Tensor]] = {}
"""By the index of the device; the CPU, where the interpreter runs, has none."""

_COMPILED: dict[tuple[int | None, int, bool, torch.dtype], Any] = {}
"""Triton's `CompiledKernel`, by device, block size, nesting and dtype, for regular arguments."""


if triton is not None:

    @triton.jit
    def decode(
        codes, stats, table, dynamic_map, weights, row, block,
        block_bytes: tl.constexpr, row_blocks: tl.constexpr, stats_bytes: tl.constexpr,
        nested: tl.constexpr, cuda: tl.constexpr,
    ):  # fmt: skip  # type: ignore[no-untyped-def]
        """The weights of some blocks of one row, (len(block), 2 * block_bytes) in the dtype of `weights`."""
        blocks: tl.constexpr = block.shape[0]
        if nested:
            own = stats + row * stats_bytes
            level = (own + row_blocks).to(tl.pointer_type(tl.float32))
            code = tl.load(own + block)
            factor = tl.load(dynamic_map + code.to(tl.int32))
            second = tl.broadcast_to(tl.load(level), (blocks,))
            if cuda:
                product = tl.inline_asm_elementwise(
                    "mul.rn.f32 $0, $1, $2;", "=f,f,f", [factor, second], dtype=tl.float32, is_pure=True, pack=1
                )
            else:  # the interpreter runs no PTX and fuses nothing
                product = factor * second
            absmax = product + tl.load(level + 1)
        else:
            absmax = tl.load(stats.to(tl.pointer_type(tl.float32)) + row * row_blocks + block)
        byte = block[:, None] * block_bytes + tl.arange(0, block_bytes)[None, :]
        pairs = tl.load(codes + row * (row_blocks * block_bytes) + byte).to(tl.int32)
        high = tl.load(table + (pairs >> 4)) * absmax[:, None]
        low = tl.load(table + (pairs & 15)) * absmax[:, None]
        dtype = weights.dtype.element_ty
        return tl.interleave(high.to(dtype), low.to(dtype))

    @triton.jit
    def _rows_to_weights(
        codes, stats, table, dynamic_map, weights, used_with, numel,
        blocks: tl.constexpr, block_bytes: tl.constexpr, row_blocks: tl.constexpr, stats_bytes: tl.constexpr,
        nested: tl.constexpr, cuda: tl.constexpr,
    ):  # fmt: skip  # type: ignore[no-untyped-def]
        """Program (row, chunk) writes `blocks` blocks of one row."""
        row = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1) * blocks + tl.arange(0, blocks)
        values = decode(
            codes, stats, table, dynamic_map, weights, row, block, block_bytes, row_blocks, stats_bytes, nested, cuda
        )
        inside = block[:, None] * (2 * block_bytes) + tl.arange(0, 2 * block_bytes)[None, :]
        at = row * (row_blocks * block_bytes * 2) + inside
        tl.store(weights + at, values, mask=at < numel)
