"""Which launches of the 4-bit kernel take Triton's own call: played with a kernel that only writes down its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_fsdp_qlora.quantization import four_bit_kernel

Calls = list[tuple[str, tuple[Any, ...]]]


class Recorder:
    """Stands for Triton's function, which inspects its arguments, and for what it compiled, which does not."""

    def __init__(self, name: str, calls: Calls) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append((self.name, arguments))
            return Recorder("compiled", self.calls)

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made: Calls = []
    monkeypatch.setattr(four_bit_kernel, "_rows_to_weights", Recorder("triton", made), raising=False)
    monkeypatch.setattr(four_bit_kernel, "_COMPILED", {})
    monkeypatch.setattr(four_bit_kernel, "_TABLES", {})
    four_bit_kernel.prepare(torch.device("cpu"), torch.zeros(256))
    return made


def launch(shape: tuple[int, int], *, skip: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Launch with codes `skip` bytes above a multiple of 16."""
    codes = torch.zeros(4 * 8192 + 16, dtype=torch.uint8)[skip : skip + 4 * 8192].view(4, 8192)
    stats = torch.zeros(4, 264, dtype=torch.uint8)
    return four_bit_kernel.launch(codes, stats, shape, quant_type="nf4", block_size=64, nested=True, dtype=dtype)


def test_regular_rows_pass_triton_once(calls: Calls) -> None:
    assert launch((64, 1024)).shape == (64, 1024)
    launch((64, 1000))
    assert [name for name, _ in calls] == ["triton", "compiled"]
    (_, first), (_, second) = calls
    tensors, rest = first[:6], first[6:]
    assert all(isinstance(value, torch.Tensor) for value in tensors) and rest[0] == 64 * 1024
    # The same arguments in the same order, tensors as addresses.
    assert all(isinstance(value, int) for value in second) and second[6] == 64 * 1000 and second[7:] == rest[1:]
    assert second[2:4] == tuple(table.data_ptr() for table in tensors[2:4])


def test_odd_addresses_and_counts_always_pass_triton(calls: Calls) -> None:
    """What was compiled for multiples of 16 would read past them, or in steps that do not fit."""
    launch((64, 1024))
    launch((64, 1024), skip=4)
    launch((63, 1001))
    assert [name for name, _ in calls] == ["triton"] * 3


def test_another_dtype_is_another_kernel(calls: Calls) -> None:
    launch((64, 1024))
    launch((64, 1024), dtype=torch.float32)
    assert [name for name, _ in calls] == ["triton"] * 2
