"""Checkpoints that stock transformers saved in bitsandbytes 4 bits. Reference: bitsandbytes on the loaded quant state,
and the loss of the stock model; both bitwise."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from hf_fsdp_qlora import ConfigError, QuantizedLinear, load_model
from hf_fsdp_qlora.fsdp1 import clean_name
from hf_fsdp_qlora.integrity import check_integrity
from hf_fsdp_qlora.quantization import BlockwiseFourBitConfig, LinearInt8Config
from tests.distributed import run_distributed
from tests.loading_story import ENGINES, LORA, batch, nf4, plain_name
from tests.test_fsdp1 import FSDP1, wrap
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import make_tokenizer
from tests.trainer_story import fsdp1_env, launch_env, make_data, report

FORMATS: dict[str, dict[str, Any]] = {
    "nf4 nested": {},
    "nf4 nested, bf16 storage": {"bnb_4bit_quant_storage": "bfloat16"},
    "nf4 nested, fp32 storage": {"bnb_4bit_quant_storage": "float32"},
    "nf4": {"bnb_4bit_use_double_quant": False},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "fp4 nested": {"bnb_4bit_quant_type": "fp4"},
}


def save_quantized(path: Path, source: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """What a person uploads: a stock 4-bit model after `save_pretrained`, in several files."""
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=nf4(**settings), dtype=dtype)
    model.save_pretrained(path, max_shard_size="60KB")
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(tmp_path_factory.mktemp("nf4"), llama)


def stock(path: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """Dequantised weights and loss. What is not quantised is cast to `dtype` here: transformers 5.23 ignores `dtype`
    for quantised folders."""
    torch.set_num_threads(1)  # as the ranks have it: float32 sums depend on it
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    layers = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = dtype  # the folder says float32, its default, which means `dtype` to us
            state = copy.deepcopy(module.weight.quant_state)
            state.dtype = dtype  # bitsandbytes' forward does the same: it dequantises to the dtype of its input
            layers[name] = bnb.dequantize_4bit(module.weight.data, state)
        for key, parameter in module.named_parameters(recurse=False):
            if type(module).__name__ != "Linear4bit" or key == "bias":
                parameter.data = parameter.data.to(dtype)
    return layers, model(**batch()).loss.item()


def load(path: str, dtype: torch.dtype, config: Any) -> tuple[dict[str, Tensor], float, Any, int]:
    model = load_model(path, quantization_config=config, peft_config=LORA, dtype=dtype)
    layers = {plain_name(n): m.dequantize() for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    return layers, model(**batch()).loss.item(), model.load_report, check_integrity(model)


def assert_equals_stock(path: Path, engine: str, dtype: torch.dtype = torch.bfloat16, config: Any = None) -> list[Any]:
    expected, expected_loss = stock(path, dtype)
    world_size, env = ENGINES[engine]
    results = run_distributed(
        load, str(path), dtype, config, world_size=world_size, env=env, process_group=world_size > 1
    )
    for layers, loss, _, _ in results:
        assert layers.keys() == expected.keys() and layers
        for name, weight in layers.items():
            assert weight.dtype == expected[name].dtype and torch.equal(weight, expected[name]), name
        assert loss == expected_loss
    return [load_report for _, _, load_report, _ in results]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_equal_bitsandbytes_on_the_stored_bytes(name: str, llama: Path, tmp_path: Path) -> None:
    for load_report in assert_equals_stock(save_quantized(tmp_path, llama, **FORMATS[name]), "fsdp2"):
        assert load_report.quantized_layers == 14 and load_report.sharded_bytes == load_report.total_bytes


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "fsdp2"])
def test_every_engine_reads_the_folder_once(engine: str, folder: Path) -> None:
    reports = assert_equals_stock(folder, engine)
    if engine.startswith("fsdp2"):
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        # What is left: file headers, tables and quant states, which every rank reads and the report does not count.
        tables = 14 * (256 + 16 + 64) * 4
        assert 0 <= stored - sum(load_report.read_bytes for load_report in reports) < tables + 40_000


@pytest.mark.parametrize("source", ["qwen2", "gpt_neox"])
def test_biases_and_tied_embeddings(source: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", source)
    assert_equals_stock(save_quantized(tmp_path / "nf4", model), "fsdp2, 3 ranks")


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_dtype_than_the_stored_one_dequantises_as_stock_forward(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", "qwen2", dtype=stored)
    assert_equals_stock(save_quantized(tmp_path / "nf4", model, dtype=stored), "fsdp2", dtype)


def test_layers_that_the_folder_keeps_in_16_bit_stay_so(llama: Path, tmp_path: Path) -> None:
    skip = ["lm_head", "layers.0.mlp.down_proj"]
    path = save_quantized(tmp_path, llama, llm_int8_skip_modules=skip)
    for load_report in assert_equals_stock(path, "fsdp2", config=nf4(llm_int8_skip_modules=skip)):
        assert load_report.unquantized_linears == ("model.layers.0.mlp.down_proj", "lm_head")
    with pytest.raises(ConfigError, match="llm_int8_skip_modules=.*1 layers.*layers.0.mlp.down_proj"):
        load_model(path, quantization_config=nf4(llm_int8_skip_modules=["lm_head"]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (nf4(bnb_4bit_quant_type="fp4"), "differs from it in bnb_4bit_quant_type .'fp4', it has 'nf4'"),
        (nf4(bnb_4bit_use_double_quant=False), "bnb_4bit_use_double_quant .False, it has True"),
        (LinearInt8Config(), "asks for LinearInt8Config"),
        (BitsAndBytesConfig(load_in_8bit=True), "load_in_8bit: True"),
        (
            BlockwiseFourBitConfig(128, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
            "bnb_4bit_blocksize .128, it has .64.",
        ),
    ],
)
def test_another_format_than_the_folder_has_is_refused(folder: Path, config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(folder, quantization_config=config)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "LLM.int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_other_quantised_folders_are_refused_by_name(folder: Path, stored: dict, name: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(ConfigError, match=f"quantised already, with .*{name}"):
        load_model(tmp_path)


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "no absmax": ("absmax", lambda t: None, "absmax is missing"),
    "no state": ("quant_state.bitsandbytes__nf4", lambda t: None, "0 tensors"),
    "short absmax": ("absmax", lambda t: t[:-1].clone(), "should have"),
    "float absmax": ("absmax", lambda t: t.float(), "has dtype torch.float32"),
    "other table": ("nested_quant_map", lambda t: t * 0.5, "another table"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_folders_are_refused_by_name(damage: str, folder: Path, tmp_path: Path) -> None:
    part, change, message = DAMAGES[damage]
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    key = f"model.layers.1.mlp.up_proj.weight.{part}"
    tensors[key] = change(tensors[key])
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "model.safetensors")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


def train(path: str, output_dir: str, resume: str | None) -> dict[str, Any]:
    model = load_model(path, peft_config=LoraConfig(r=4, target_modules="all-linear"), dtype=torch.float32)
    args = SFTConfig(
        output_dir=output_dir, per_device_train_batch_size=1, max_steps=4, logging_steps=1, save_strategy="steps",
        save_steps=2, report_to=[], learning_rate=1e-2, max_length=64, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=make_data(16), processing_class=make_tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(Path(output_dir) / "final"))
    layers = [(clean_name(n), m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    weights = {plain_name(name): layer.dequantize() for name, layer in layers}
    return {**report(trainer), "rows": check_integrity(model), "weights": weights}


@pytest.mark.parametrize(
    "env", [launch_env("fsdp2"), fsdp1_env(False), fsdp1_env(True)], ids=["fsdp2", "flat", "orig"]
)
def test_two_ranks_train_the_stored_bytes_and_resume_exactly(
    env: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    """What hubs have: uint8 storage, double quantisation, written by stock transformers."""
    expected, _ = stock(folder, torch.float32)
    whole = run_distributed(train, str(folder), str(tmp_path / "whole"), None, env=env, process_group=False)
    resume = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run_distributed(train, str(folder), str(tmp_path / "resumed"), resume, env=env, process_group=False)
    for rank in (*whole, *resumed):
        assert rank["weights"].keys() == expected.keys() and rank["rows"] > 0
        for name, weight in expected.items():
            assert torch.equal(rank["weights"][name], weight.reshape(rank["weights"][name].shape)), name
    assert [rank["losses"] for rank in resumed] == [rank["losses"] for rank in whole]
    assert len(set(whole[0]["losses"])) == 4
    files = [tmp_path / run / "final" / "adapter_model.safetensors" for run in ("whole", "resumed")]
    first, second = (load_file(file) for file in files)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def step(path: str, use_orig_params: bool) -> dict[str, Any]:
    """A step in bf16, the dtype under which FSDP1 then stores rows."""
    model: Any = load_model(path, peft_config=LORA)
    layers = {plain_name(n): m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    wrapped = wrap(model, use_orig_params)
    wrapped.train()
    wrapped(**batch()).loss.backward()
    rows = check_integrity(wrapped)
    return {"rows": rows, "weights": {name: m.dequantize() for name, m in layers.items()}}


@pytest.mark.parametrize("name", FORMATS)
def test_fsdp1_holds_the_stored_bytes_of_every_format(name: str, llama: Path, tmp_path: Path) -> None:
    path = save_quantized(tmp_path, llama, **FORMATS[name])
    expected, _ = stock(path, torch.bfloat16)
    for rank in run_distributed(step, str(path), "nested" in name, env=FSDP1):
        assert rank["rows"] > 0 and rank["weights"].keys() == expected.keys()
        for key, weight in expected.items():
            assert torch.equal(rank["weights"][key], weight.reshape(rank["weights"][key].shape)), key


def test_fp16_mixed_precision_is_refused_before_the_folder_is_read(folder: Path) -> None:
    env = {**FSDP1, "ACCELERATE_MIXED_PRECISION": "fp16"}
    for text in run_distributed(refuse_fp16, str(folder), env=env):
        assert "mixed_precision: fp16 with 4-bit weights" in text


def refuse_fp16(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(path, peft_config=LORA)
    return str(caught.value)
