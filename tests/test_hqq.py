"""What is particular to HQQ: whole tensors, packing, its config; tests/conformance holds it to the rest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("hqq", reason="hqq is not installed (the extra hf_fsdp_qlora[hqq])")

from hqq.core.quantize import HQQLinear, Quantizer
from transformers import HqqConfig

from hf_fsdp_qlora import ConfigError, load_model
from hf_fsdp_qlora.quantization import backend_for_config, skip_modules
from hf_fsdp_qlora.quantization.hqq import PLANES, HqqBackend, pack_codes, unpack_codes
from tests.distributed import run_distributed
from tests.tiny_models import save_tiny_model

CPU = {"ACCELERATE_USE_CPU": "true"}
FSDP2 = {**CPU, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("nbits", PLANES)
def test_packing_is_exact_and_as_small_as_the_bits(nbits: int) -> None:
    codes = torch.randint(0, 2**nbits, (5, 512), dtype=torch.uint8)
    packed = pack_codes(codes, nbits)
    assert packed.shape == (5, 512 * nbits // 8) and torch.equal(unpack_codes(packed, nbits), codes)
    assert torch.equal(unpack_codes(packed[2:4], nbits), codes[2:4])


@pytest.mark.parametrize("group_size", [8, 16, 128, 320])
@pytest.mark.parametrize("nbits", PLANES)
@pytest.mark.parametrize("axis", [0, 1])
def test_every_group_size_equals_hqq(nbits: int, group_size: int, axis: int) -> None:
    torch.set_num_threads(1)
    weight = torch.randn(64, 320, dtype=torch.bfloat16) * 0.02
    config = HqqConfig(nbits=nbits, group_size=group_size, axis=axis)
    backend = backend_for_config(config, torch.bfloat16)
    rows = backend.quantize(weight.flatten(), weight.numel(), lambda rows: rows)
    reference = HQQLinear.from_weights(weight, None, config.quant_config, torch.bfloat16, device="cpu")
    assert torch.equal(backend.dequantize(*rows, (64, 320)), reference.dequantize())


def test_number_of_groups_that_hqq_itself_cannot_pack() -> None:
    """hqq puts group i and group i + n/2 into one byte, so it needs an even number; rows do not."""
    weight = torch.randn(3, 64)
    settings = HqqConfig(nbits=4, group_size=64).quant_config["weight_quant_params"]
    codes, meta = Quantizer.quantize(weight, device="cpu", bitpack=False, **settings)
    expected = (codes - meta["zero"]) * meta["scale"]
    backend = backend_for_config(HqqConfig(nbits=4, group_size=64), torch.float32)
    rows = backend.quantize(weight.flatten(), weight.numel(), lambda rows: rows)
    assert torch.equal(backend.dequantize(*rows, (3, 64)), expected)


def load_and_count(path: str) -> tuple[int, float]:
    model = load_model(path, quantization_config=HqqConfig(nbits=4, group_size=32), fsdp="auto")
    return model.load_report.read_bytes, model(input_ids=torch.arange(20)[None]).logits.double().sum().item()


def test_one_rank_reads_each_tensor_and_they_take_turns(llama: Path) -> None:
    ((alone, logits),) = run_distributed(load_and_count, str(llama), world_size=1, env=CPU, process_group=False)
    for env in (FSDP2, CPU):
        ranks = run_distributed(load_and_count, str(llama), env=env, process_group=env is FSDP2)
        extra = sum(read for read, _ in ranks) - alone
        # Without FSDP every rank reads for itself what is not quantised: embedding, head, norms.
        assert extra == 0 if env is FSDP2 else 0 < extra < 0.3 * alone
        assert all(read < 0.7 * alone for read, _ in ranks)
        assert [value for _, value in ranks] == [logits, logits]


def fail_on_rank_1(path: str) -> str:
    if dist.get_rank() == 1:

        def fail(*args: Any) -> Any:
            raise ArithmeticError("the solver diverged")

        HqqBackend.quantize = fail  # type: ignore[method-assign,assignment]
    with pytest.raises((RuntimeError, ArithmeticError)) as caught:
        load_model(path, quantization_config=HqqConfig())
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_failing_owner_is_everybodys_error_and_hangs_nobody(llama: Path) -> None:
    first, second = run_distributed(fail_on_rank_1, str(llama), env=FSDP2, timeout_s=60)
    assert first == "RuntimeError: quantising a weight failed on rank 1: ArithmeticError: the solver diverged"
    assert second == "ArithmeticError: the solver diverged"


def test_skip_modules_are_honoured(llama: Path) -> None:
    config = HqqConfig(skip_modules=["lm_head", "self_attn.o_proj"])
    assert skip_modules(config) == ["lm_head", "self_attn.o_proj"]
    report = load_model(llama, quantization_config=config).load_report
    kept = ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "lm_head")
    assert report.unquantized_linears == kept and report.quantized_layers == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(nbits=1), r"HqqConfig\(nbits=1\) has no row format; use one of 8, 4, 3, 2"),
        (dict(group_size=None), "all layers share one row format. Use a number"),
        (dict(dynamic_config={"mlp.up_proj": {"nbits": 2}}), r"dynamic_config=...\) with settings for mlp.up_proj"),
    ],
)
def test_settings_without_a_row_format_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backend_for_config(HqqConfig(**settings), torch.bfloat16)


def test_dtype_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="dtype=torch.float64 cannot be quantised by hqq"):
        backend_for_config(HqqConfig(), torch.float64)


def test_weights_that_are_no_whole_number_of_groups_are_refused_by_name(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj of shape \(96, 96\) .* groups of 40.*'q_proj'"):
        load_model(llama, quantization_config=HqqConfig(group_size=40))


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    config = HqqConfig()
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    with pytest.raises(ConfigError, match=r"pip install hf_fsdp_qlora\[hqq\]"):
        backend_for_config(config, torch.bfloat16)
