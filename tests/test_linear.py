"""QuantizedLinear and the bitsandbytes rows, against bitsandbytes on the whole tensor. Everything is bitwise."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn
from transformers import BitsAndBytesConfig

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.formats import four_bit_rows, shard_range
from hf_fsdp_qlora.linear import QuantizedLinear, as_bytes
from hf_fsdp_qlora.quantization import BlockwiseFourBitConfig, DenseConfig, backend_for_config
from hf_fsdp_qlora.quantization.base import dequantize_op
from hf_fsdp_qlora.quantization.bitsandbytes import BLOCK_SIZES, FourBitBackend

# Smaller than a row, ending inside a block, inside a row, odd numbers of elements, one row wide, several rows.
SHAPES = [(96, 96), (1, 63), (300, 257), (513, 1000), (64, 1), (128, 384)]


def make_linear(
    weight: torch.Tensor, config: BitsAndBytesConfig, *, bias: bool = False, storage_dtype: torch.dtype = torch.uint8
) -> QuantizedLinear:
    backend = backend_for_config(config, weight.dtype)
    codes, stats = backend.quantize(weight.flatten(), weight.numel(), lambda rows: rows)
    layer = QuantizedLinear(weight.shape[1], weight.shape[0], bias=bias, backend=backend, storage_dtype=storage_dtype)
    layer.weight = nn.Parameter(codes.view(storage_dtype), requires_grad=False)
    layer.weight_stats = nn.Parameter(stats.view(storage_dtype), requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(torch.randn(weight.shape[0]).to(weight.dtype))
    return layer


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def bitsandbytes_weight(weight: torch.Tensor, quant_type: str, block_size: int, nested: bool) -> torch.Tensor:
    codes, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=quant_type, compress_statistics=nested)
    return bnb.dequantize_4bit(codes, state).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_linear_equals_bitsandbytes(quant_type: str, nested: bool, dtype: torch.dtype, block_size: int) -> None:
    config = BlockwiseFourBitConfig(block_size, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested)
    for shape in SHAPES:
        weight = torch.randn(shape).to(dtype)
        expected = bitsandbytes_weight(weight, quant_type, block_size, nested)
        layer = make_linear(weight, config, bias=True)
        assert torch.equal(layer.dequantize(), expected), shape

        x = torch.randn(2, 3, shape[1], dtype=dtype)
        ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
        bias = layer.bias.detach().clone().requires_grad_()
        output, wanted = layer(ours), nn.functional.linear(reference, expected, bias)
        gradient = torch.randn_like(output)
        output.backward(gradient)
        wanted.backward(gradient)
        assert torch.equal(output, wanted) and torch.equal(gradient_of(ours), gradient_of(reference)), shape
        # Two ways to sum six values; the tolerance is their rounding.
        torch.testing.assert_close(gradient_of(layer.bias), gradient_of(bias))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_of_bitsandbytes_is_a_format(block_size: int) -> None:
    weight = torch.randn(100, 130)
    config = BlockwiseFourBitConfig(block_size, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    expected = bitsandbytes_weight(weight, "nf4", block_size, True)
    assert torch.equal(make_linear(weight, config).dequantize(), expected)


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_rows_made_by_parts_equal_rows_made_at_once(num_ranks: int) -> None:
    """The gather is played by hand: absmax of every part first, then each part with the whole vector."""
    weight = torch.randn(513, 700, dtype=torch.bfloat16)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    backend = backend_for_config(config, torch.bfloat16)
    whole = backend.quantize(weight.flatten(), weight.numel(), lambda rows: rows)
    row_size, num_rows = backend.format.row_size, backend.format.num_rows(weight.numel())
    parts = []
    for rank in range(num_ranks):
        first, last = shard_range(num_rows, rank, num_ranks)
        parts.append(weight.flatten()[first * row_size : last * row_size])
    absmax: list[torch.Tensor] = []

    def record(rows: torch.Tensor) -> torch.Tensor:
        absmax.append(rows)
        return torch.ones(num_rows, 256)

    for part in parts:
        backend.quantize(part, weight.numel(), record)
    made = [backend.quantize(part, weight.numel(), lambda rows: torch.cat(absmax)) for part in parts]
    for index in range(2):
        assert torch.equal(torch.cat([rows[index] for rows in made]), whole[index])


@pytest.mark.parametrize("storage_dtype", [torch.uint8, torch.float32], ids=str)
def test_casting_a_model_never_touches_the_rows(storage_dtype: torch.dtype) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    layer = make_linear(torch.randn(64, 64), config, bias=True, storage_dtype=storage_dtype)
    codes, stats = as_bytes(layer.weight).clone(), as_bytes(layer.weight_stats).clone()
    model = nn.Sequential(layer).half().double().to(torch.bfloat16)
    assert torch.equal(as_bytes(layer.weight), codes) and torch.equal(as_bytes(layer.weight_stats), stats)
    assert model[0].bias.dtype == torch.bfloat16


def test_compute_dtype_default_is_the_model_dtype_and_autocast_wins() -> None:
    layer = make_linear(torch.randn(32, 32, dtype=torch.bfloat16), BitsAndBytesConfig(load_in_4bit=True))
    assert layer.compute_dtype == torch.bfloat16
    x = torch.randn(4, 32)
    dense = layer.dequantize()
    assert torch.equal(layer(x), (x.bfloat16() @ dense.T).float())
    wide = make_linear(torch.randn(32, 32), BitsAndBytesConfig(load_in_4bit=True))
    assert wide.compute_dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wide(x), (x.bfloat16() @ wide.dequantize().bfloat16().T).float())


def test_one_vector_is_an_input_too() -> None:
    layer = make_linear(torch.randn(8, 16), BitsAndBytesConfig(load_in_4bit=True), bias=True)
    layer(torch.randn(16, requires_grad=True)).sum().backward()
    assert torch.equal(gradient_of(layer.bias), torch.ones(8))


def test_backward_keeps_packed_rows_only() -> None:
    layer = make_linear(torch.randn(256, 256), BitsAndBytesConfig(load_in_4bit=True))
    saved: list[torch.Tensor] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        layer(torch.randn(2, 256, requires_grad=True))
    rows = {layer.weight.data_ptr(), layer.weight_stats.data_ptr()}
    assert saved and {tensor.data_ptr() for tensor in saved} <= rows


@pytest.mark.parametrize("storage_dtype", [torch.uint8, torch.float32], ids=str)
def test_layer_compiles_without_a_graph_break_and_its_op_passes_opcheck(storage_dtype: torch.dtype) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    layer = make_linear(torch.randn(48, 80), config, bias=True, storage_dtype=storage_dtype)
    x = torch.randn(3, 80, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    args = (as_bytes(layer.weight), as_bytes(layer.weight_stats), layer.backend.spec, 48, 80, x.detach())
    torch.library.opcheck(dequantize_op, args)


def lora_linear_by_hand(
    layer: QuantizedLinear, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float
) -> torch.Tensor:
    return nn.functional.linear(x, layer.dequantize(), layer.bias.detach()) + scaling * (x @ lora_a.T) @ lora_b.T


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_lora_linear_equals_the_sum_of_both_products(compiled: bool) -> None:
    """In float32, where only the order of additions differs: the tolerance is float32's rounding over 80 terms."""
    layer = make_linear(torch.randn(48, 80), BitsAndBytesConfig(load_in_4bit=True), bias=True)
    layer.bias.requires_grad_(False)
    inputs = torch.randn(2, 5, 80), torch.randn(4, 80), torch.randn(48, 4)
    ours, reference = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    call = torch.compile(layer, fullgraph=True) if compiled else layer
    output = call(ours[0], lora=(ours[1], ours[2], 0.5))
    expected = lora_linear_by_hand(layer, reference[0], reference[1], reference[2], 0.5)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    expected.backward(gradient)
    for mine, wanted in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient_of(mine), gradient_of(wanted), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_lora_linear_keeps_its_input_and_packed_rows_only(compiled: bool) -> None:
    layer = make_linear(torch.randn(256, 256), BitsAndBytesConfig(load_in_4bit=True))
    call = torch.compile(layer, fullgraph=True) if compiled else layer
    x, lora_a, lora_b = (torch.randn(shape, requires_grad=True) for shape in [(9, 256), (3, 256), (256, 3)])
    saved: list[torch.Tensor] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        call(x, lora=(lora_a, lora_b, 1.0))
    given = {tensor.data_ptr() for tensor in (x, lora_a, lora_b, layer.weight, layer.weight_stats)}
    others = [tensor for tensor in saved if tensor.data_ptr() not in given and tensor.dim()]
    assert [tuple(tensor.shape) for tensor in others] == [(9, 3)]  # x A


def test_lora_linear_does_without_the_weight_where_its_input_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_linear(torch.randn(64, 96), BitsAndBytesConfig(load_in_4bit=True))
    x, a, b = torch.randn(3, 96), torch.randn(4, 96, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    output, wanted = layer(x, lora=(a, b, 0.5)), (x @ a.T @ b.T * 0.5).sum()
    monkeypatch.setattr(FourBitBackend, "dequantize", lambda *_: pytest.fail("dequantised"))
    output.sum().backward()
    for found, expected in zip((a.grad, b.grad), torch.autograd.grad(wanted, (a, b)), strict=True):
        torch.testing.assert_close(found, expected)


def test_format_arithmetic_of_nested_nf4() -> None:
    rows = four_bit_rows(64, nested=True)
    assert (rows.row_size, rows.code_bytes, rows.stats_bytes) == (16384, 8192, 264)
    assert rows.num_rows(16385) == 2 and rows.num_bytes(1) == 8456


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), "Set load_in_4bit=True"),
        (BlockwiseFourBitConfig(100), "use one of"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4"), "use 'nf4' or 'fp4'"),
        (object(), "has no backend"),
    ],
)
def test_config_without_a_row_format_is_refused(config: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backend_for_config(config, torch.bfloat16)


def test_unquantised_rows_are_read_in_place() -> None:
    """A product with them copies no weight."""
    backend = backend_for_config(DenseConfig(), torch.bfloat16)
    codes, stats = backend.quantize(torch.randn(3 * 8192 + 5).to(torch.bfloat16), 3 * 8192 + 5, lambda rows: rows)
    assert backend.dequantize(codes, stats, (3, 8192)).data_ptr() == codes.data_ptr()
    assert (codes.shape, stats.shape) == ((4, 16384), (4, 4))
