"""What every backend must hold on one process: rows stand alone, values are the library's, bytes survive.

Everything is bitwise unless a comment says why not.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_fsdp_qlora.linear import QuantizedLinear, as_bytes
from hf_fsdp_qlora.quantization import QuantizationBackend, backend_for_config, quant_methods
from tests.conformance.cases import CASES, EVERY_CASE

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]

# One row that is not full; several rows, the last not full; in_features that no block size divides; whole rows only.
SHAPES = [(16, 64), (300, 256), (576, 100), (256, 512)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As the ranks have it; sums of some libraries depend on it."""
    torch.set_num_threads(1)


def make_weight(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return (torch.randn(shape, generator=generator) * 0.02).to(device, dtype)


def make_backend(name: str, dtype: torch.dtype = torch.bfloat16) -> QuantizationBackend:
    return backend_for_config(CASES[name].make_config(), dtype)


def make_rows(backend: QuantizationBackend, weight: Tensor) -> tuple[Tensor, Tensor]:
    return backend.quantize(weight.flatten(), weight.numel(), lambda rows: rows)


def make_linear(name: str, weight: Tensor, storage_dtype: torch.dtype = torch.uint8) -> QuantizedLinear:
    backend = make_backend(name, weight.dtype)
    out_features, in_features = weight.shape
    layer = QuantizedLinear(in_features, out_features, bias=False, backend=backend, storage_dtype=storage_dtype)
    layer.weight, layer.weight_stats = (
        nn.Parameter(part.view(storage_dtype), requires_grad=False) for part in make_rows(backend, weight)
    )
    return layer


def test_every_registered_backend_has_a_case() -> None:
    assert sorted({case.quant_method for case in CASES.values()}) == quant_methods()


@pytest.mark.parametrize("device", DEVICES)
@DTYPES
@EVERY_CASE
def test_values_equal_the_library(name: str, dtype: torch.dtype, device: str) -> None:
    backend = make_backend(name, dtype)
    for shape in SHAPES:
        weight = make_weight(shape, dtype, device)
        dense = backend.dequantize(*make_rows(backend, weight), shape)
        assert dense.dtype == dtype and dense.shape == shape
        assert torch.equal(dense, CASES[name].reference(weight)), shape


@EVERY_CASE
def test_a_block_of_zeros_stays_zero_and_hurts_nobody(name: str) -> None:
    weight = make_weight((256, 512), torch.bfloat16)
    zeros = CASES[name].in_rows(torch.arange(weight.numel()), 0, 4096)
    weight.view(-1)[zeros] = 0
    backend = make_backend(name)
    dense = backend.dequantize(*make_rows(backend, weight), (256, 512))
    assert torch.isfinite(dense).all()
    # The offset of double quantisation is added back in float32, to 1e-3 of the largest absmax.
    assert dense.view(-1)[zeros].abs().max() <= 1e-3 * weight.abs().max()


@EVERY_CASE
def test_rows_stand_alone(name: str) -> None:
    backend = make_backend(name)
    weight = make_weight((300, 512), torch.bfloat16)
    codes, stats = make_rows(backend, weight)
    whole = backend.dequantize(codes, stats, (300, 512)).flatten()
    row_size, last = backend.format.row_size, len(codes)
    for first, stop in [(0, 1), (1, last - 1), (last - 1, last), (2, last)]:
        part = CASES[name].in_rows(whole, first * row_size, stop * row_size)
        alone = backend.dequantize(codes[first:stop].clone(), stats[first:stop].clone(), (1, part.numel()))
        assert torch.equal(alone.flatten(), part), (first, stop)


@EVERY_CASE
def test_format_tells_the_bytes_that_are_stored(name: str) -> None:
    backend = make_backend(name)
    layout = backend.format
    for shape in SHAPES:
        weight = make_weight(shape, torch.bfloat16)
        codes, stats = make_rows(backend, weight)
        assert codes.dtype == stats.dtype == torch.uint8 and codes.is_contiguous() and stats.is_contiguous()
        assert codes.shape == (layout.num_rows(weight.numel()), layout.code_bytes)
        assert stats.shape == (len(codes), layout.stats_bytes)
        assert codes.numel() + stats.numel() == layout.num_bytes(weight.numel())
    assert weight.numel() % layout.row_size == 0, "the last shape is whole rows, so nothing is padding"
    assert (codes.numel() + stats.numel()) / weight.numel() == layout.bytes_per_weight


@EVERY_CASE
def test_runs_of_rows_are_quantised_as_in_the_whole(name: str) -> None:
    """What sharding while loading and requantising in place rely on."""
    backend = make_backend(name)
    if backend.whole_tensor:
        pytest.skip("the backend asks for the whole tensor; test_sharded.py covers it")
    weight = make_weight((300, 512), torch.bfloat16).flatten()
    whole = make_rows(backend, weight)
    asked: list[Tensor] = []

    def remember(rows: Tensor) -> Tensor:
        asked.append(rows)
        return rows

    backend.quantize(weight, weight.numel(), remember)
    row_size = backend.format.row_size
    for first, stop in [(0, 2), (2, 3), (3, len(whole[0])), (7, 7)]:
        from_all_ranks = iter(asked)
        part = weight[first * row_size : stop * row_size]
        made = backend.quantize(part, weight.numel(), lambda rows, gathered=from_all_ranks: next(gathered))  # type: ignore[misc]
        for mine, all_rows in zip(made, whole, strict=True):
            assert torch.equal(mine, all_rows[first:stop]), (first, stop)


@pytest.mark.parametrize("storage_dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@EVERY_CASE
def test_moves_and_casts_change_no_byte(
    name: str, storage_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_linear(name, make_weight((300, 256), torch.bfloat16), storage_dtype)
    expected = [as_bytes(layer.weight).clone(), as_bytes(layer.weight_stats).clone()]

    def never(*args: object) -> None:
        raise AssertionError("moving a layer quantised it again")

    monkeypatch.setattr(type(layer.backend), "quantize", never)
    moved = nn.Sequential(copy.deepcopy(layer)).half().double().to(torch.float32).cpu()
    if torch.cuda.is_available():
        moved = moved.cuda().to(torch.bfloat16).cpu()
    empty = nn.Sequential(copy.deepcopy(layer))
    for parameter in empty.parameters():
        parameter.zero_()
    empty.load_state_dict(moved.state_dict())
    for result in (moved, empty):
        for parameter, rows in zip(result.parameters(), expected, strict=True):
            assert parameter.dtype == storage_dtype and torch.equal(as_bytes(parameter), rows)


@EVERY_CASE
def test_a_dequantised_weight_is_the_callers_own(name: str) -> None:
    """Also where the backend only looks at the rows."""
    layer = make_linear(name, make_weight((300, 256), torch.bfloat16))
    before = layer.dequantize()
    layer.dequantize().zero_()
    assert torch.equal(layer.dequantize(), before) and before.any()


@DTYPES
@EVERY_CASE
def test_output_and_input_gradient_equal_the_dequantised_linear(name: str, dtype: torch.dtype) -> None:
    weight = make_weight((96, 320), dtype)
    layer, dense = make_linear(name, weight), CASES[name].reference(weight)
    ours, theirs = (make_weight((6, 320), dtype).requires_grad_() for _ in range(2))
    output, expected = layer(ours), nn.functional.linear(theirs, dense)
    gradient = make_weight((6, 96), dtype)
    output.backward(gradient)
    expected.backward(gradient)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(output, expected) and torch.equal(ours.grad, theirs.grad)


@EVERY_CASE
def test_compiles_without_a_graph_break(name: str) -> None:
    layer = make_linear(name, make_weight((64, 128), torch.float32))
    x = make_weight((3, 128), torch.float32).requires_grad_()
    # The graph is what is tested, not the code that inductor makes of it.
    torch._dynamo.reset()  # or the cases would count as recompilations of one function
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3, 64) @ layer.dequantize())
