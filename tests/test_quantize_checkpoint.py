"""Folders that `quantize` writes. Reference: stock transformers quantising the original while it loads. Bitwise."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_fsdp_qlora import ConfigError, load_model
from hf_fsdp_qlora.checkpoint import read_header
from hf_fsdp_qlora.checkpoint_writer import CheckpointWriter
from hf_fsdp_qlora.cli import main
from hf_fsdp_qlora.quantization import BlockwiseFourBitConfig
from hf_fsdp_qlora.quantize_checkpoint import quantize_checkpoint
from tests.loading_story import batch, nf4
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import make_tokenizer

FORMATS = {
    "nf4 nested": nf4(),
    "nf4": nf4(bnb_4bit_use_double_quant=False),
    "fp4 nested": nf4(bnb_4bit_quant_type="fp4"),
    "skip": nf4(llm_int8_skip_modules=["lm_head", "down_proj"]),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny_model(tmp_path_factory.mktemp("llama"), dtype=torch.float32, shard_size="100KB")
    make_tokenizer().save_pretrained(path)
    return path


def values(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every weight of a stock 4-bit model, dequantised where it is quantised."""
    found = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        found[name] = parameter.data if state is None else bnb.dequantize_4bit(parameter.data, state)
    return found


def assert_same_as_quantising_on_load(folder: Path, source: Path, config: BitsAndBytesConfig, dtype: Any) -> None:
    expected = values(AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype))
    loaded = values(AutoModelForCausalLM.from_pretrained(folder))
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name


@pytest.mark.parametrize("name", FORMATS)
def test_stock_transformers_reads_what_it_would_have_quantised_itself(name: str, llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = quantize_checkpoint(llama, output, quantization_config=FORMATS[name], max_shard_bytes=50_000)
    assert_same_as_quantising_on_load(output, llama, FORMATS[name], torch.bfloat16)
    assert report.num_quantized == (12 if name == "skip" else 14)
    assert report.unquantized_linears[-1] == "lm_head"
    files = sorted(output.glob("model-*-of-*.safetensors"))
    assert len(files) > 3 and not list(tmp_path.glob("*.incomplete")) and not list(output.glob("shard-*"))
    # The largest group, the embedding of 259 x 96 bf16 weights, is within the limit, so every file is.
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 50_000 for file in files)
    assert (output / "tokenizer.json").is_file() and (output / "generation_config.json").is_file()


@pytest.mark.parametrize("name", ["qwen2", "gpt_neox", "gemma2"])
def test_other_architectures_and_dtypes(name: str, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", name)
    quantize_checkpoint(source, tmp_path / "out", quantization_config=nf4(), dtype=torch.float16)
    assert_same_as_quantising_on_load(tmp_path / "out", source, nf4(), torch.float16)


def test_files_are_those_that_stock_transformers_saves(llama: Path, tmp_path: Path) -> None:
    quantize_checkpoint(llama, tmp_path / "ours", quantization_config=nf4())
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=nf4(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "stock")
    ours, stock = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "stock"))
    assert ours.keys() == stock.keys()
    assert all(ours[key].dtype == stock[key].dtype and torch.equal(ours[key], stock[key]) for key in stock)
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "stock")]
    assert configs[0]["quantization_config"].pop("bnb_4bit_compute_dtype") == "bfloat16"
    assert configs[1]["quantization_config"].pop("bnb_4bit_compute_dtype") == "float32"
    assert configs[0] == configs[1]


def test_load_model_gives_the_same_model_from_the_folder_and_from_the_original(llama: Path, tmp_path: Path) -> None:
    config = BlockwiseFourBitConfig(128, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantize_checkpoint(llama, tmp_path / "out", quantization_config=config)
    folder = load_model(tmp_path / "out")
    original = load_model(llama, quantization_config=config)
    assert folder(**batch()).loss.item() == original(**batch()).loss.item()
    assert folder.load_report.read_bytes < original.load_report.read_bytes / 2


def without(name: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from ((key, tensor) for key, tensor in tensors.items() if key != name)


def test_tensors_may_come_from_the_caller(llama: Path, tmp_path: Path) -> None:
    tensors = {k: v for file in llama.glob("*.safetensors") for k, v in load_file(file).items()}
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(llama / "config.json", bare / "config.json")
    quantize_checkpoint(bare, tmp_path / "out", quantization_config=nf4(), tensors=without("", tensors))
    assert_same_as_quantising_on_load(tmp_path / "out", llama, nf4(), torch.bfloat16)
    for bad, message in {
        "missing": (without("model.norm.weight", tensors), "1 weights of the model are missing: model.norm.weight"),
        "unknown": (iter([("x", torch.zeros(1))]), "x is no weight"),
        "shape": (iter([("model.norm.weight", torch.zeros(7))]), r"has shape \(7,\), the model \(96,\)"),
        "twice": (iter([*tensors.items(), ("model.norm.weight", tensors["model.norm.weight"])]), "came before"),
    }.values():
        with pytest.raises(ConfigError, match=message):
            quantize_checkpoint(bare, tmp_path / "bad", quantization_config=nf4(), tensors=bad)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "out"]


def test_command_writes_and_reports(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    words = ["quantize", str(llama), str(output), "--double-quant", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_quantized"] == 14 and 0.5 < report["bytes_per_weight"] < 0.75  # tables weigh much here
    assert_same_as_quantising_on_load(output, llama, nf4(), torch.bfloat16)
    assert main(words) == 2 and "not an empty folder" in capsys.readouterr().err
    assert main(["quantize", str(output), str(tmp_path / "again")]) == 2
    assert "already" in capsys.readouterr().err
    assert main(["quantize", str(llama), str(tmp_path / "again"), "--block-size", "48"]) == 2
    assert "block_size=48" in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ["out"]


def test_writer_keeps_every_tensor_aligned_and_every_shard_within_its_header(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(5, dtype=torch.uint8), "half": torch.arange(3, dtype=torch.bfloat16),
        "long": torch.arange(3), "scalar": torch.tensor(2.5), "int": torch.arange(7, dtype=torch.int32),
    }  # fmt: skip
    with CheckpointWriter(tmp_path) as writer:
        for name, tensor in tensors.items():
            writer.add({name: tensor})
        for index in range(2000):
            writer.add({f"many.{index}": torch.full((1,), index)})
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) == 2 and index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values()) + 16_000
    read = {key: value for file in files for key, value in load_file(file).items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items()) and read["many.1999"] == 1999
    stored = read_header(files[0])
    assert stored.keys() >= tensors.keys()
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in stored.values())
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
