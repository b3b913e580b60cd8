"""An adapter remembers how its base was quantised, and merging into the dequantised base needs no further word."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig

from hf_fsdp_qlora import ConfigError, QuantizedLinear, load_model, merge_adapter, save_adapter
from hf_fsdp_qlora.base_record import RECORD_NAME, other_base, read_record
from hf_fsdp_qlora.commands import merge
from hf_fsdp_qlora.quantization import (
    BlockwiseFourBitConfig,
    DenseConfig,
    DynamicInt8Config,
    LinearInt8Config,
    backend_for_config,
)
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import make_tokenizer


def nf4(**changes: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **changes)


CONFIGS = {
    "nf4": nf4(),
    "nf4, one layer kept": nf4(llm_int8_skip_modules=["down_proj", "lm_head"]),
    "fp4, blocks of 128": BlockwiseFourBitConfig(128, bnb_4bit_quant_type="fp4"),
    "linear int8, one layer kept": LinearInt8Config(64, modules_to_not_convert=["down_proj", "lm_head"]),
    "dynamic int8": DynamicInt8Config(),
    "unquantised rows": DenseConfig(),
    "hqq": HqqConfig(nbits=4, group_size=64),
}


def train_and_save(base: Path, folder: Path, config: Any, *, dtype: Any = torch.bfloat16, **lora: Any) -> Any:
    """A saved adapter with random values, and the model it is for."""
    peft_config = LoraConfig(r=4, target_modules="all-linear", **lora)
    model: Any = load_model(base, quantization_config=config, peft_config=peft_config, dtype=dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(0, 0.2)
    save_adapter(model, folder)
    return model


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_merge_into_dequantized_equals_peft_on_the_weights_of_training(
    name: str, use_dora: bool, tmp_path: Path
) -> None:
    """Bit for bit: the reference is PEFT on a plain model with the weights that training computed with."""
    base = save_tiny_model(tmp_path / "base")
    model = train_and_save(base, tmp_path / "adapter", CONFIGS[name], use_dora=use_dora)
    merge_adapter(tmp_path / "adapter", tmp_path / "out", into="dequantized")
    assert assert_merged_as_peft_does(model, base, tmp_path) == (12 if "kept" in name else 14)


def assert_merged_as_peft_does(model: Any, base: Path, folder: Path) -> int:
    """Compare with PEFT on a plain model that has the weights `model` computes with; their number is returned."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    replaced = 0
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, QuantizedLinear):
            weight: Any = plain.get_submodule(path.removesuffix(".base_layer")).weight
            weight.data.copy_(module.dequantize())
            replaced += 1
    expected = PeftModel.from_pretrained(plain, folder / "adapter").merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder / "out", dtype="auto").state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    return replaced


MIXES = {
    "half of it in float32": (torch.float32, torch.bfloat16),
    "a float32 embedding": (torch.bfloat16, torch.float32),
    "float16 and bfloat16": (torch.float16, torch.bfloat16),
}


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "told"])
@pytest.mark.parametrize("mix", MIXES)
def test_merge_into_dequantized_casts_a_base_of_mixed_dtypes_as_training_did(
    mix: str, recorded: bool, tmp_path: Path
) -> None:
    """Training casts every tensor to bfloat16, whatever the checkpoint's tensors are; so does its config say."""
    base = save_tiny_model(tmp_path / "base", dtype=torch.float32)
    of_linears, of_others = MIXES[mix]
    tensors = load_file(base / "model.safetensors")
    cast = {key: value.to(of_linears if "proj" in key else of_others) for key, value in tensors.items()}
    save_file(cast, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    model = train_and_save(base, tmp_path / "adapter", nf4())
    if not recorded:
        (tmp_path / "adapter" / RECORD_NAME).unlink()
    merge_adapter(
        tmp_path / "adapter", tmp_path / "out", into="dequantized", quantization_config=None if recorded else nf4()
    )
    assert_merged_as_peft_does(model, base, tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_record_keeps_the_dtype_of_training(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", dtype=torch.float32)
    train_and_save(base, tmp_path / "adapter", nf4(), dtype=torch.bfloat16)
    record = read_record(tmp_path / "adapter")
    assert record is not None and record.dtype == torch.bfloat16
    specs = [backend_for_config(config, record.dtype).spec for config in (record.quantization_config, nf4())]
    assert specs[0] == specs[1]
    merge_adapter(tmp_path / "adapter", tmp_path / "out", into="dequantized")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="cast to torch.bfloat16 .*dtype=torch.float16"):
        merge_adapter(tmp_path / "adapter", tmp_path / "other", into="dequantized", dtype=torch.float16)


def test_a_config_that_contradicts_the_record_is_refused(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    adapter = tmp_path / "adapter"
    train_and_save(base, adapter, nf4())
    for wrong in (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), LinearInt8Config()):
        with pytest.raises(ConfigError, match="was trained on bitsandbytes/nf4/block=64/nested=True"):
            merge_adapter(adapter, tmp_path / "out", into="dequantized", quantization_config=wrong)
    merge_adapter(adapter, tmp_path / "out", into="dequantized", quantization_config=nf4())
    values = json.loads((adapter / RECORD_NAME).read_text())
    (adapter / RECORD_NAME).write_text(json.dumps({**values, "config_class": "SomeonesConfig"}))
    with pytest.raises(ConfigError, match="SomeonesConfig, which is not known"):
        merge_adapter(adapter, tmp_path / "second", into="dequantized")
    merge_adapter(adapter, tmp_path / "second", into="dequantized", quantization_config=nf4())


def test_loading_an_adapter_on_another_base_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, adapter = save_tiny_model(tmp_path / "base"), tmp_path / "adapter"
    train_and_save(base, adapter, nf4())

    def warnings(config: Any, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        caplog.clear()
        load_model(base, quantization_config=config, dtype=dtype, adapter_name_or_path=str(adapter))
        return [record.message for record in caplog.records if "was trained on" in record.message]

    own = f"{adapter} was trained on bitsandbytes/nf4/block=64/nested=True/torch.bfloat16"
    assert warnings(nf4()) == warnings(nf4(bnb_4bit_compute_dtype=torch.bfloat16)) == []
    for config, dtype, found in (
        (BlockwiseFourBitConfig(128, bnb_4bit_quant_type="nf4"), torch.bfloat16, "nf4/block=128/nested=False"),
        (LinearInt8Config(), torch.bfloat16, "on linear_int8"),
        (None, torch.bfloat16, "on an unquantised base"),
        (nf4(), torch.float32, "made from torch.float32"),
    ):
        [warning] = warnings(config, dtype)
        assert warning.startswith(own) and found in warning.partition("loaded")[2]
    (adapter / RECORD_NAME).unlink()
    assert warnings(None) == []
    train_and_save(base, adapter, None)
    assert warnings(None, torch.float32) == [] and len(warnings(nf4())) == 1


def test_an_adapter_trained_on_hqq_loads_without_hqq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of bases is for a warning; what the other base was made with may be missing here."""
    config = HqqConfig(nbits=4, group_size=64)
    record = {"config_class": "HqqConfig", "quantization_config": config.to_dict(), "dtype": "bfloat16"}
    (tmp_path / RECORD_NAME).write_text(json.dumps(record, default=str))
    assert "was trained on hqq" in str(other_base(tmp_path, nf4(), torch.bfloat16))
    monkeypatch.setattr("transformers.utils.quantization_config.is_hqq_available", lambda: False)
    assert other_base(tmp_path, nf4(), torch.bfloat16) is None


def test_an_adapter_of_an_unquantised_base_has_nothing_to_dequantise(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    train_and_save(base, tmp_path / "adapter", None)
    with pytest.raises(ConfigError, match="not quantised. Use into='original'"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", into="dequantized")
    assert merge_adapter(tmp_path / "adapter", tmp_path / "out").num_low_rank == 14


def test_merge_command_reads_the_record_and_compares_with_the_base_of_training(tmp_path: Path, capsys: Any) -> None:
    """fp32: merged into the dequantised base, only rounding is left; into the original, the quantisation error."""
    # Sizes that bitsandbytes' CPU kernel takes.
    base = save_tiny_model(tmp_path / "base", dtype=torch.float32, hidden_size=128, intermediate_size=256)
    make_tokenizer().save_pretrained(base)
    train_and_save(base, tmp_path / "adapter", nf4(), dtype=torch.float32)
    (tmp_path / "text").write_text("to be or not to be that is the question")
    parser = argparse.ArgumentParser()
    merge.register(parser.add_subparsers())
    divergences = {}
    for into in ("dequantized", "original"):
        line = ["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / into), "--into", into, "--json"]
        assert merge.run(parser.parse_args([*line, "--text", str(tmp_path / "text")])) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["unmerged_base"] == "as trained, in 4 bits"
        divergences[into] = answer["comparison"]["kl_divergence"]
    assert abs(divergences["dequantized"]) < 1e-6 < 1e-5 < divergences["original"]
