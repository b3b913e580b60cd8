"""What is particular to the int8 formats; tests/conformance holds them to what every backend must do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from hf_fsdp_qlora import ConfigError, QuantizedLinear, load_model
from hf_fsdp_qlora.quantization import (
    DynamicInt8Config,
    LinearInt8Config,
    QuantizationBackend,
    backend_for_config,
    skip_modules,
)
from hf_fsdp_qlora.quantization.int8 import DYNAMIC_BLOCK_SIZES
from tests.tiny_models import save_tiny_model

CONFIGS = pytest.mark.parametrize("config_class", [DynamicInt8Config, LinearInt8Config])


def rows_of(backend: QuantizationBackend, weight: Tensor) -> tuple[Tensor, Tensor]:
    return backend.quantize(weight.flatten(), weight.numel(), lambda rows: rows)


def round_trip(backend: QuantizationBackend, weight: Tensor) -> Tensor:
    return backend.dequantize(*rows_of(backend, weight), (weight.shape[0], weight.shape[1]))


@pytest.mark.parametrize("block_size", DYNAMIC_BLOCK_SIZES)
def test_dynamic_int8_equals_bitsandbytes_at_every_block_size(block_size: int) -> None:
    weight = torch.randn(100, 130, dtype=torch.bfloat16)
    backend = backend_for_config(DynamicInt8Config(block_size), torch.bfloat16)
    expected = bnb.dequantize_blockwise(*bnb.quantize_blockwise(weight, blocksize=block_size))
    assert torch.equal(round_trip(backend, weight), expected)


@pytest.mark.parametrize("block_size", [1, 7, 32, 300])
def test_linear_int8_takes_any_block_size(block_size: int) -> None:
    weight = torch.randn(33, 55)
    backend = backend_for_config(LinearInt8Config(block_size), torch.float32)
    for block, result in zip(
        weight.flatten().split(block_size), round_trip(backend, weight).flatten().split(block_size), strict=True
    ):
        # Half a step, and the rounding of a float32 product.
        assert (block - result).abs().max() <= block.abs().max() / 127 * 0.500001


def test_linear_int8_keeps_tiny_and_huge_weights() -> None:
    weight = torch.tensor([[1e-30, -3e-31, 3e38, -1e38, 1e-44, 0.0]]).repeat(1, 3)
    weight = weight.view(3, 6).T.contiguous().repeat_interleave(2, 1)  # one magnitude per row of six
    backend = backend_for_config(LinearInt8Config(6), torch.float32)
    result = round_trip(backend, weight)
    assert torch.isfinite(result).all()
    # Equal weights have code 127; 127 * (absmax / 127) is off by two roundings. Subnormal scales round to a multiple.
    torch.testing.assert_close(result[:4], weight[:4], rtol=3e-7, atol=0)
    assert (result[5] == 0).all()


@CONFIGS
def test_error_on_normal_weights_is_what_the_docs_say(config_class: type) -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    error = (round_trip(backend_for_config(config_class(), torch.float32), weight) - weight).norm() / weight.norm()
    # A million weights: the third digit of the ratio is stable.
    assert round(100 * error.item(), 2) == (1.02 if config_class is DynamicInt8Config else 0.65)


@CONFIGS
def test_rows_can_be_requantised_in_place_from_a_master(config_class: type) -> None:
    """What the rotary trainer does when it parks a block: any run of rows, also the last and short one."""
    backend = backend_for_config(config_class(), torch.float32)
    row_size, generator = backend.format.row_size, torch.Generator().manual_seed(0)
    master = torch.randn(190, 450, generator=generator)
    codes, stats = rows_of(backend, master)
    master.add_(torch.randn(190, 450, generator=generator) * 0.1)
    flat = master.flatten()
    for first, stop in [(3, 5), (0, 3), (5, len(codes))]:
        made = backend.quantize(flat[first * row_size : stop * row_size], flat.numel(), lambda rows: rows)
        codes[first:stop].copy_(made[0])
        stats[first:stop].copy_(made[1])
    fresh = rows_of(backend, master)
    assert torch.equal(codes, fresh[0]) and torch.equal(stats, fresh[1])


@CONFIGS
def test_modules_to_not_convert_stay_linear(config_class: type, tmp_path: Path) -> None:
    config = config_class(modules_to_not_convert=["down_proj"])
    assert skip_modules(config) == ["down_proj"] and skip_modules(config_class()) is None
    assert config.to_dict()["quant_method"] == config.quant_method
    model = load_model(save_tiny_model(tmp_path), quantization_config=config)
    kept = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head")
    assert model.load_report.unquantized_linears == kept and model.load_report.quantized_layers == 12
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, QuantizedLinear) and layer.backend.format.bytes_per_weight == 1 + 4 / 128


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        (DynamicInt8Config(32), torch.bfloat16, r"block_size=32 .* use one of \(64, 128"),
        (LinearInt8Config(0), torch.bfloat16, "block_size=0 must be a positive number"),
        (LinearInt8Config(), torch.float64, "dtype=torch.float64 cannot be quantised to int8"),
    ],
)
def test_settings_without_a_format_are_refused(config: object, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backend_for_config(config, dtype)
