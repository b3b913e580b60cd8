"""Refusals that no other test meets: damaged or odd checkpoints and models, each with its message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hf_fsdp_qlora import ConfigError, engine, load_model
from hf_fsdp_qlora.quantization import backend_for_config
from hf_fsdp_qlora.quantization.stored import pack_weight
from hf_fsdp_qlora.skeleton import decoder_layers, replace_linears
from tests.loading_story import nf4
from tests.test_loading_refusals import TINY, save_config
from tests.test_prequantized import save_quantized
from tests.tiny_models import make_config, save_tiny_model

UP_PROJ = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP_PROJ}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(tmp_path_factory.mktemp("nf4"), llama)


def with_state(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def pack_head(tensors: dict[str, Tensor]) -> None:
    packed = pack_weight(tensors.pop("lm_head.weight"), backend_for_config(nf4(), torch.bfloat16))  # type: ignore[arg-type]
    tensors |= {f"lm_head.weight{part}": tensor for part, tensor in packed.items()}


STORED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no codes": (lambda tensors: tensors.pop(UP_PROJ), f"statistics of {UP_PROJ} but not {UP_PROJ} itself"),
    "block size": (with_state(blocksize=100), "has a quant state that cannot be read here: .*100"),
    "dtype": (with_state(dtype="float64"), "has a quant state that cannot be read here: .*float64"),
    "second level": (
        with_state(nested_blocksize=128),
        "has second-level blocks that rows do not hold .256 float32.*128",
    ),
    "quant type": (with_state(quant_type="int4"), "bnb_4bit_quant_type='int4' is unknown; use 'nf4' or 'fp4'"),
    "head": (pack_head, r"holds lm_head \(Linear\) in 4 bits; only linear layers other than the head"),
}


@pytest.mark.parametrize("case", STORED)
def test_stored_weights_that_are_not_rows_are_refused(case: str, folder: Path, tmp_path: Path) -> None:
    change, message = STORED[case]
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


def test_folder_that_only_says_it_is_quantised_is_refused(llama: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(
        ConfigError, match="says that the checkpoint is in bitsandbytes 4 bits, but none of its weights"
    ):
        load_model(tmp_path)


def test_dtype_that_has_no_four_bit_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="dtype=torch.float64 cannot be quantised to 4 bit; use bfloat16"):
        backend_for_config(nf4(), torch.float64)


def test_models_of_another_kind_are_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="transformers has no causal language model for DistilBertConfig"):
        load_model(save_config(tmp_path, transformers.DistilBertConfig()), quantization_config=nf4())
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["input_layernorm"])
    with pytest.raises(
        ConfigError, match="LlamaForCausalLM keeps input_layernorm in float32.*Pass dtype=torch.float32"
    ):
        load_model(llama, quantization_config=nf4())
    monkeypatch.undo()
    monkeypatch.setattr(LlamaForCausalLM, "_no_split_modules", None)
    model = tiny_llama()
    model._no_split_modules = None
    with pytest.raises(ConfigError, match="LlamaForCausalLM names no decoder layer class .*_no_split_modules"):
        decoder_layers(model)


def tiny_llama() -> Any:
    with torch.device("meta"):
        config: Any = make_config("llama")
        return LlamaForCausalLM(config)


class OddLinear(nn.Linear):
    """What custom code may have."""


@pytest.mark.parametrize("skip", [None, ["lm_head", "up_proj"]])
def test_linear_of_another_class_is_not_left_unquantised_in_silence(skip: list[str] | None) -> None:
    model, backend = tiny_llama(), backend_for_config(nf4(), torch.bfloat16)
    model.model.layers[1].mlp.up_proj = OddLinear(96, 224, bias=False, device="meta")
    if skip is not None:  # knowingly
        replace_linears(model, backend, skip_modules=skip, storage_dtype=torch.uint8)
        return
    message = "up_proj.weight .OddLinear. would stay unquantised: only nn.Linear itself.*'up_proj'"
    with pytest.raises(ConfigError, match=message):
        replace_linears(model, backend, skip_modules=skip, storage_dtype=torch.uint8)


def test_weights_that_transformers_would_merge_are_refused(tmp_path: Path) -> None:
    sizes = dict(num_key_value_heads=1, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32)
    config = transformers.Qwen3MoeConfig(**{**TINY, **sizes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is merged or split while loading .*save_original_format=False"):
        load_model(tmp_path)


def test_gradients_on_the_host_need_a_backend_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(engine.dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(ConfigError, match="the process group cannot reduce them there. Set fsdp_offload_params: true"):
        engine.check_offload_backend("all", "fsdp2", cuda)
    engine.check_offload_backend("base", "fsdp2", cuda)
    monkeypatch.setattr(engine.dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    engine.check_offload_backend("all", "fsdp2", cuda)
