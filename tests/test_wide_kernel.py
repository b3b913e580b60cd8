"""The Triton kernel for siblings against the reference that copies, bit for bit (where: test_four_bit_kernel.py)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from hf_fsdp_qlora.formats import WideShape
from hf_fsdp_qlora.quantization import BlockwiseFourBitConfig, backend_for_config
from hf_fsdp_qlora.quantization.base import QuantizationBackend
from hf_fsdp_qlora.quantization.bitsandbytes import dynamic_map
from hf_fsdp_qlora.quantization.four_bit_kernel import prepare
from hf_fsdp_qlora.quantization.wide_kernel import plan, write

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_device = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA, or TRITON_INTERPRET=1 with Triton installed"
)
# Grouped query attention; two layers of several rows; one of two in a product of its own; odd ranks.
SHAPES = [
    WideShape(256, (256, 64, 64), (16, 16, 16), 48),
    WideShape(512, (200, 100), (8, 8), 16),
    WideShape(1024, (300,), (16,), 32, 16),
    WideShape(128, (40, 1, 130), (3, 5, 8), 16),
    WideShape(4096, (96, 32, 32), (64, 64, 64), 192),
]


def members(backend: Any, wide: WideShape, dtype: torch.dtype) -> tuple[list[Any], list[Any], list[Any]]:
    """Codes, statistics and B of each member."""
    generator = torch.Generator().manual_seed(0)
    codes, stats, lora_b = [], [], []
    for out_features, rank in zip(wide.out_features, wide.ranks, strict=True):
        weight = (torch.randn(out_features * wide.in_features, generator=generator) * 0.02).to(DEVICE, dtype)
        rows = backend.quantize(weight, weight.numel(), lambda whole: whole)
        codes.append(rows[0])
        stats.append(rows[1])
        lora_b.append(torch.randn(out_features, rank, generator=generator).to(DEVICE, dtype))
    return codes, stats, lora_b


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("wide", SHAPES, ids=lambda wide: f"{wide.in_features}-{len(wide.ranks)}")
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_kernel_equals_the_reference(block_size: int, wide: WideShape, nested: bool, dtype: torch.dtype) -> None:
    config = BlockwiseFourBitConfig(block_size, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    backend: Any = backend_for_config(config, dtype)
    how = plan(wide, block_size, nested)
    assert how is not None
    codes, stats, lora_b = members(backend, wide, dtype)
    prepare(codes[0].device, dynamic_map(codes[0].device))
    expected = QuantizationBackend.dequantize_wide(backend, codes, stats, lora_b, wide, codes[0])
    made = write(codes, stats, lora_b, wide, how, quant_type="nf4", used_with=codes[0])
    assert made.shape == wide.shape
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts off instead of rounding
        torch.testing.assert_close(made, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("wide", "block_size"),
    [
        (WideShape(96, (96, 96), (8, 8), 16), 64), (WideShape(128, (128, 128), (2, 2), 4), 64),
        (WideShape(8192, (2**18,), (8,), 8), 64), (WideShape(28672, (74870,), (8,), 8), 4096),
        (WideShape(128, (8, 8, 8, 8), (8, 8, 8, 8), 32), 64),
    ],
    ids=["blocks across rows of the weight", "odd width", "more than 32 bits", "with padding", "too many"],
)  # fmt: skip
def test_shapes_that_do_not_fit(wide: WideShape, block_size: int) -> None:
    assert plan(wide, block_size, True) is None
