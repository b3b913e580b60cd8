"""Saved adapters: continued, evaluated, compared with the user's config. And every refusal, with its message."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.loading import load_model
from hf_fsdp_qlora.lora import load_adapter_weights
from hf_fsdp_qlora.lora_config import check_peft_config, read_adapter_config
from tests.lora_models import TOKENS, assert_same_tensors, bnb_config, load_with_adapter, meta_model, stock_model
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, biases on q, k and v."""
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.fixture(scope="module")
def trained(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock adapter with every kind of saved tensor, all of them changed as training would."""
    config = LoraConfig(
        r=4, target_modules="all-linear", modules_to_save=["lm_head", "norm"], bias="lora_only", use_rslora=True,
        task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    model = stock_model(qwen2, config, quantized=True)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(path))
    return path


@pytest.mark.parametrize("is_trainable", [True, False])
def test_saved_adapter_continues_and_evaluates_as_in_stock(qwen2: Path, trained: Path, is_trainable: bool) -> None:
    config = read_adapter_config(str(trained), meta_model(qwen2), is_trainable=is_trainable)
    ours = load_with_adapter(qwen2, config, fill=lambda model: load_adapter_weights(model, str(trained)))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        qwen2, dtype=torch.bfloat16, quantization_config=bnb_config()
    )
    stock = PeftModel.from_pretrained(base.train(), trained, is_trainable=is_trainable)
    assert_same_tensors(get_peft_model_state_dict(ours), load_file(trained / "adapter_model.safetensors"))
    assert torch.equal(ours.train()(input_ids=TOKENS).logits, stock.train()(input_ids=TOKENS).logits)
    names = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, stock)]
    assert names[0] == (names[1] if is_trainable else set())  # stock leaves the biases trainable


def test_saved_adapter_that_does_not_fit_is_refused_with_the_keys(
    llama: Path, qwen2: Path, trained: Path, tmp_path: Path
) -> None:
    config = read_adapter_config(str(trained), meta_model(qwen2))
    tensors = load_file(trained / "adapter_model.safetensors")
    first, second, third, *_ = sorted(tensors)
    broken = {"extra.weight": tensors.pop(first), **tensors, second: torch.zeros(3, 5)}
    save_file(broken, tmp_path / "adapter_model.safetensors")

    def load(path: Path) -> None:
        load_with_adapter(qwen2, config, fill=lambda model: load_adapter_weights(model, str(path)))

    with pytest.raises(ConfigError, match="1 missing .* 1 unexpected .extra.weight.*3, 5") as caught:
        load(tmp_path)
    assert first in str(caught.value) and second in str(caught.value) and third not in str(caught.value)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="pickle"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="there is no adapter_model.safetensors"):
        load(llama)
    with pytest.raises(ConfigError, match="adapter_config.json"):
        read_adapter_config(str(llama), meta_model(qwen2))


def test_peft_config_must_agree_with_the_saved_adapter(qwen2: Path, trained: Path) -> None:
    model = meta_model(qwen2)
    same = LoraConfig(
        r=4, target_modules="all-linear", modules_to_save=["norm", "lm_head"], bias="lora_only", use_rslora=True,
        lora_dropout=0.3,
    )  # fmt: skip
    assert read_adapter_config(str(trained), model, peft_config=same).lora_dropout == 0.3
    other = LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["norm"], bias="lora_only", use_rslora=True)
    with pytest.raises(ConfigError, match=r"disagree on r \(8 against 4\).*target_modules.*modules_to_save"):
        read_adapter_config(str(trained), model, peft_config=other)


def test_adapters_trained_on_a_changed_base_are_refused(qwen2: Path, trained: Path, tmp_path: Path) -> None:
    saved = json.loads((trained / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ConfigError, match="pissa_niter_4.*path_initial_model_for_weight_conversion"):
        read_adapter_config(str(tmp_path), meta_model(qwen2))


REFUSED = {
    "PiSSA": (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'.*unload.*adapter_name_or_path.*'gaussian'"),
    "PiSSA iterations": (dict(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "OLoRA": (dict(init_lora_weights="olora"), "'olora': it moves a part of the full weight .*adapter_name_or_path"),
    "CorDA": (dict(init_lora_weights="corda"), "corda"),
    "EVA": (dict(init_lora_weights="eva"), "'eva'.*initialize_lora_eva_weights.*adapter_name_or_path"),
    "LoRA-GA": (dict(init_lora_weights="lora_ga"), "lora_ga"),
    "MiCA": (dict(init_lora_weights="mica"), "mica"),
    "unknown initialisation": (dict(init_lora_weights="kaiming"), "kaiming"),
    "odd rank": (dict(init_lora_weights="orthogonal", rank_pattern={"q_proj": 3}), r"even ranks, got \[3\]"),
    "tokens": (dict(trainable_token_indices=[1, 2]), "trainable_token_indices.*modules_to_save"),
    "parameters": (dict(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters"),
    "replication": (dict(layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
    "Megatron": (dict(megatron_config={"a": 1}), "megatron_config"),
    "QA-LoRA": (dict(use_qalora=True), "use_qalora"),
    "Conv1D": (dict(fan_in_fan_out=True), "fan_in_fan_out"),
    "aLoRA": (dict(alora_invocation_tokens=[3], task_type="CAUSAL_LM"), "alora_invocation_tokens"),
    "block-diagonal": (dict(use_bdlora=peft.tuners.lora.BdLoraConfig()), "use_bdlora"),
    "task": (dict(task_type="SEQ_CLS"), "task_type"),
    "typing error": (dict(target_modules=["q_prj", "v_proj"]), "'q_prj' matches nothing.*q_proj"),
    "nothing": (dict(target_modules=".*nothing"), "leaves no module.*q_proj.*all-linear"),
    "all excluded": (dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), "leaves no module"),
    "head": (dict(target_modules=["q_proj", "lm_head"]), r"lm_head.*modules_to_save=\['lm_head'\]"),
    "embedding": (dict(target_modules=["q_proj", "embed_tokens"]), "embed_tokens"),
    "norms": (dict(target_modules=".*(q_proj|norm)"), "no linear layers.*RMSNorm"),
    "saved nothing": (dict(modules_to_save=["lm_heads"]), "modules_to_save: 'lm_heads'.*lm_head"),
    "saved quantized": (dict(modules_to_save=["down_proj"]), "down_proj.*llm_int8_skip_modules"),
    "saved layers": (dict(target_modules=["q_proj"], modules_to_save=["mlp"]), "'mlp' would train quantized"),
    "rank pattern": (dict(rank_pattern={"q_projs": 3}), "rank_pattern: 'q_projs'.*q_proj"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_honoured_is_refused_by_name(llama: Path, settings: dict, message: str) -> None:
    config = LoraConfig(**{"target_modules": "all-linear", **settings})
    with pytest.raises(ConfigError, match=message):
        check_peft_config(config, meta_model(llama))


def test_loftq_is_refused(llama: Path) -> None:
    config = LoraConfig(target_modules="all-linear")
    config.init_lora_weights = "loftq"  # PEFT's own constructor wants scipy for it
    with pytest.raises(ConfigError, match="init_lora_weights='loftq'.*replace_lora_weights_loftq"):
        check_peft_config(config, meta_model(llama))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_the_refusal_of_pissa_and_olora_says_works(
    llama: Path, init: Literal["pissa", "olora"], tmp_path: Path
) -> None:
    """Reference: the original weight. Quantised residual and adapter together come closer to it than its own
    quantisation does with PiSSA (arXiv 2404.02948, section 4), and about as close with OLoRA."""
    lora = LoraConfig(r=32, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    original = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    decomposed: Any = peft.get_peft_model(model, lora)
    decomposed.peft_config["default"].init_lora_weights = True
    decomposed.save_pretrained(str(tmp_path / "adapter"))
    decomposed.unload().save_pretrained(tmp_path / "base")

    ours: Any = load_model(
        tmp_path / "base", quantization_config=bnb_config(torch.float32), dtype=torch.float32,
        adapter_name_or_path=str(tmp_path / "adapter"),
    )  # fmt: skip
    layer = ours.get_base_model().model.layers[0].mlp.up_proj
    adapter = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    codes, state = bnb.quantize_4bit(original, quant_type="nf4", compress_statistics=True)
    plain = (bnb.dequantize_4bit(codes, state) - original).norm()
    assert (layer.base_layer.dequantize() + adapter - original).norm() < (0.9 if init == "pissa" else 1.1) * plain


def test_all_problems_are_reported_together_and_nothing_is_changed(llama: Path) -> None:
    config = LoraConfig(fan_in_fan_out=True, init_lora_weights="pissa", target_modules=["q_proj", "q_prj"])
    unchanged = copy.deepcopy(config)
    with pytest.raises(ConfigError, match=r"(?s)- fan_in_fan_out.*- init_lora_weights.*- target_modules: 'q_prj'"):
        check_peft_config(config, meta_model(llama))
    assert config == unchanged


@pytest.mark.parametrize("config", [peft.IA3Config(), peft.AdaLoraConfig(total_step=5), peft.PromptTuningConfig()])
def test_other_peft_methods_are_refused(llama: Path, config: peft.PeftConfig) -> None:
    with pytest.raises(ConfigError, match=f"{type(config).__name__}.*LoraConfig"):
        check_peft_config(config, meta_model(llama))


def test_all_biases_beside_a_saved_module_with_a_bias_are_refused(tmp_path: Path) -> None:
    model = meta_model(save_tiny_model(tmp_path, "gpt_neox"))
    config = LoraConfig(target_modules="all-linear", bias="all", modules_to_save=["final_layer_norm"])
    with pytest.raises(ConfigError, match="bias='all'.*final_layer_norm.*lora_only"):
        check_peft_config(config, model)
