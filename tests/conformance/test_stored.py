"""What a file must give back: rows of any backend, and the weights of those that stock checkpoints hold quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_fsdp_qlora.checkpoint import index_checkpoint, stream_slices
from hf_fsdp_qlora.linear import as_bytes
from hf_fsdp_qlora.quantization.bitsandbytes import FourBitBackend
from hf_fsdp_qlora.quantization.stored import find_packed_weights, pack_weight
from tests.conformance.cases import CASES, EVERY_CASE
from tests.conformance.test_rows import SHAPES, make_backend, make_linear, make_rows, make_weight

IN_STOCK_CHECKPOINTS = [name for name, case in CASES.items() if case.quant_method == "bitsandbytes"]


@pytest.mark.parametrize("storage_dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@EVERY_CASE
def test_rows_come_back_from_a_file(name: str, storage_dtype: torch.dtype, tmp_path: Path) -> None:
    layer = make_linear(name, make_weight((300, 256), torch.bfloat16), storage_dtype)
    save_file(layer.state_dict(), tmp_path / "rows.safetensors")
    again = make_linear(name, make_weight((300, 256), torch.bfloat16) * 2, storage_dtype)
    again.load_state_dict(load_file(tmp_path / "rows.safetensors"))
    for rows, expected in zip(again.parameters(), layer.parameters(), strict=True):
        assert torch.equal(as_bytes(rows), as_bytes(expected))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", IN_STOCK_CHECKPOINTS)
def test_stored_weights_become_the_rows_that_quantising_makes(name: str, num_ranks: int, tmp_path: Path) -> None:
    """Each rank reads its bytes alone; together they are what `quantize` makes of the whole weight."""
    torch.set_num_threads(1)
    backend = make_backend(name)
    assert isinstance(backend, FourBitBackend)
    for shape in SHAPES:
        weight = make_weight(shape, torch.bfloat16)
        file = tmp_path / f"{shape[0]}.safetensors"
        save_file({f"x.weight{part}": tensor for part, tensor in pack_weight(weight, backend).items()}, file)
        packed, others = find_packed_weights(
            index_checkpoint([file]), dtype=backend.dtype, compute_dtype=backend.dtype
        )
        assert list(packed) == ["x.weight"] and not others
        expected = make_rows(backend, weight)
        chunk = -(-len(expected[0]) // num_ranks)
        for first in range(0, len(expected[0]), chunk):
            last = min(first + chunk, len(expected[0]))
            parts = list(stream_slices(packed["x.weight"].row_slices(first, last), torch.device("cpu")))
            for made, whole in zip(packed["x.weight"].rows(parts, last - first), expected, strict=True):
                assert torch.equal(made, whole[first:last]), (shape, first)
