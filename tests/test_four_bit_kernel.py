"""The Triton kernel against bitsandbytes on the same device, bit for bit.

On a machine without CUDA it runs under Triton's interpreter where Triton is installed and TRITON_INTERPRET=1 is set;
the reference is then bitsandbytes on the CPU.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb

from hf_fsdp_qlora.quantization import BlockwiseFourBitConfig, backend_for_config
from hf_fsdp_qlora.quantization.bitsandbytes import BLOCK_SIZES, dynamic_map
from hf_fsdp_qlora.quantization.four_bit_kernel import TABLES, available, dequantize, prepare

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_device = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA, or TRITON_INTERPRET=1 with Triton installed"
)
# One element, odd counts, ending inside a block, inside a row, exactly at a row's end, several rows.
SHAPES = [(1, 1), (1, 63), (300, 257), (513, 1000), (128, 128), (64, 1280)]


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_kernel_equals_bitsandbytes(quant_type: str, nested: bool, dtype: torch.dtype, block_size: int) -> None:
    config = BlockwiseFourBitConfig(block_size, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested)
    backend = backend_for_config(config, dtype)
    generator = torch.Generator().manual_seed(block_size)
    for shape in SHAPES:
        weight = (torch.randn(shape, generator=generator) * 0.02).to(DEVICE, dtype)
        codes, stats = backend.quantize(weight.flatten(), weight.numel(), lambda rows: rows)
        whole, state = bnb.quantize_4bit(
            weight, blocksize=block_size, quant_type=quant_type, compress_statistics=nested
        )
        expected = bnb.dequantize_4bit(whole, state).reshape(shape)
        prepare(codes.device, dynamic_map(codes.device))
        made = dequantize(
            codes, stats, shape,
            quant_type=quant_type, block_size=block_size, nested=nested, dtype=dtype, used_with=codes,
        )  # fmt: skip
        if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts off instead of rounding
            torch.testing.assert_close(made, expected, rtol=2**-7, atol=0)
            continue
        assert torch.equal(_bits(made), _bits(expected)), (shape, (made != expected).sum())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_launching_again_and_from_odd_addresses_gives_the_same(nested: bool) -> None:
    """The second launch of regular rows does without Triton's own call; rows at odd addresses never do."""
    config = BlockwiseFourBitConfig(64, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    backend: Any = backend_for_config(config, torch.bfloat16)
    for shape in [*SHAPES, (1024, 1024)]:
        weight = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        codes, stats = backend.quantize(weight.flatten(), weight.numel(), lambda rows: rows)
        odd_codes, odd_stats = (_at_odd_address(rows) for rows in (codes, stats))
        expected = backend.reference_dequantize(codes, stats, shape)
        for rows in [(codes, stats), (codes, stats), (odd_codes, stats), (codes, odd_stats), (codes, stats)]:
            assert torch.equal(backend.dequantize(*rows, shape), expected), shape


def _at_odd_address(rows: torch.Tensor) -> torch.Tensor:
    """A contiguous copy whose address is 4 above a multiple of 16: float32 statistics are read from there."""
    memory = torch.empty(rows.numel() + 4, dtype=torch.uint8, device=rows.device)
    return memory[4:].view(rows.shape).copy_(rows)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernel_runs_on_the_device_of_its_rows() -> None:
    """Merging on cuda:1, for example, while cuda:0 is current."""
    backend = backend_for_config(BlockwiseFourBitConfig(64, bnb_4bit_use_double_quant=True), torch.bfloat16)
    weight = torch.randn(513, 1000, device="cuda:1", dtype=torch.bfloat16)
    codes, stats = backend.quantize(weight.flatten(), weight.numel(), lambda rows: rows)
    made = backend.dequantize(codes, stats, (513, 1000))
    assert torch.cuda.current_device() == 0 and made.device == weight.device
    assert torch.equal(made, backend.reference_dequantize(codes, stats, (513, 1000)))  # type: ignore[attr-defined]


def test_kernel_is_for_nvidia_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes runs on AMD GPUs, which torch calls CUDA too; the kernel has PTX in it."""
    codes: Any = SimpleNamespace(is_cuda=True)
    assert available(codes) == (torch.version.hip is None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not available(codes)


def test_tables_are_those_of_bitsandbytes() -> None:
    for quant_type, table in TABLES.items():
        ours = torch.tensor(table, dtype=torch.float32)
        theirs = bnb.get_4bit_type(quant_type, device="cpu")
        # FP4's literals in bitsandbytes' kernel are decimal roundings of its own table.
        torch.testing.assert_close(ours, theirs, rtol=0 if quant_type == "nf4" else 1e-7, atol=0)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns, with minus zero as zero on the CPU, where bitsandbytes has none."""
    return (tensor + 0 if DEVICE == "cpu" else tensor).contiguous().view(torch.uint8)
