"""What load_model refuses, and the words in which it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_fsdp_qlora import ConfigError, load_model
from tests.distributed import run_distributed
from tests.loading_story import FSDP2, nf4
from tests.tiny_models import make_config, save_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama", shard_size="100KB")


def save_config(path: Path, config: transformers.PretrainedConfig) -> Path:
    config.save_pretrained(path)
    save_file({"x": torch.zeros(1)}, path / "model.safetensors", metadata={"format": "pt"})
    return path


TINY: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
REFUSED = {
    "experts": (transformers.MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=2), "fused experts"),
    "conv1d": (transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64), "Conv1D"),
    "encoder": (transformers.T5Config(d_model=32, num_layers=1, num_heads=2), "encoder-decoder"),
    "multimodal": (transformers.Gemma3Config(), "multimodal"),
    "quantised": (make_config("llama", quantization_config={"quant_method": "bitsandbytes"}), "quantised already"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_handled_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    config, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=message):
        load_model(save_config(tmp_path, config), quantization_config=nf4())


def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, file)
    with pytest.raises(ConfigError, match="lacks 1 weights .*layers.1.mlp.up_proj.weight"):
        load_model(tmp_path, quantization_config=nf4())
    save_file({**tensors, "model.norm.weight": torch.zeros(7)}, file)
    with pytest.raises(ConfigError, match=r"model.norm.weight: \(7,\) in the checkpoint, \(96,\) in the model"):
        load_model(tmp_path, quantization_config=nf4())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(quantization_config=nf4(bnb_4bit_quant_storage="bfloat16"), fsdp="fsdp2"), "needs a process group"),
        (dict(fsdp="fsdp1"), "FSDP1 needs a process group"),
        (dict(fsdp="zero3"), "use 'auto'"),
        (dict(offload="all"), "needs FSDP2"),
        (dict(offload="some"), "use 'none', 'base'"),
        (dict(dtype=torch.int8), "use bfloat16"),
        (dict(device_map="auto"), "device_map"),
        (dict(quantization_config=nf4(llm_int8_skip_modules=["model"])), "quantises nothing"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(llama: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(llama, **arguments)


def refuse_storage(path: str) -> str:
    with pytest.raises(ConfigError, match="NaN bit patterns") as caught:
        load_model(path, quantization_config=nf4(bnb_4bit_quant_storage="bfloat16"))
    return str(caught.value)


def test_bf16_storage_under_fsdp2_is_refused_with_the_reason(llama: Path) -> None:
    for message in run_distributed(refuse_storage, str(llama), env=FSDP2):
        assert "Leave bnb_4bit_quant_storage at its default" in message


def refuse_everything_at_once(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(path, quantization_config=nf4(bnb_4bit_quant_storage="bfloat16"), device_map="auto")
    return str(caught.value)


def test_the_rules_of_validate_run_inside_load_model_and_report_together(llama: Path) -> None:
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    env = {**FSDP2, **sizes, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"}
    for message in run_distributed(refuse_everything_at_once, str(llama), env=env):
        for part in ("bnb_4bit_quant_storage", "device_map", "2 replicas of 2 ranks are not 2", "LOCAL_STATE_DICT"):
            assert part in message
        assert message.count("why:") == message.count("fix:") == 4


def refuse_class(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(path, quantization_config=nf4())
    return str(caught.value)


def test_wrap_policy_that_names_no_class_is_refused_before_reading(llama: Path) -> None:
    env = {**FSDP2, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block"}
    assert all("GPT2Block is no class" in message for message in run_distributed(refuse_class, str(llama), env=env))


def test_quantised_model_without_an_adapter_refuses_to_be_saved(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama, quantization_config=nf4())
    with pytest.raises(ConfigError, match="hf-fsdp-qlora quantize"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
