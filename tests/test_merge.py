"""merge_adapter against PEFT's merge_and_unload, bit for bit, and the folder it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_fsdp_qlora import saved_adapter
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.merge import merge_adapter
from tests.tiny_models import ARCHITECTURES, save_tiny_model

SHARDED = "60KB"  # a tiny model in several files


def make_adapter(base: Path, path: Path, *, vocab_size: int | None = None, dtype=torch.bfloat16, **lora) -> Path:
    """A saved adapter with random contents, as if it had been trained."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if vocab_size:
        model.resize_token_embeddings(vocab_size)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 7, "target_modules": "all-linear", **lora}))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.normal_(0, 0.2)
        elif parameter.requires_grad:
            parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
    adapted.save_pretrained(str(path))
    return path


def peft_merge(base: Path, adapter: Path, *, vocab_size: int | None = None) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if vocab_size:
        model.resize_token_embeddings(vocab_size)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def assert_same_model(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": dict(),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "patterns": dict(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6}, alpha_pattern={"k_proj": 3}),
    "lora_bias": dict(lora_bias=True, target_modules=["q_proj"]),
    "bias_all": dict(bias="all", target_modules=["q_proj", "o_proj"]),
    "modules_to_save": dict(modules_to_save=["lm_head", "embed_tokens"]),
    "embedding": dict(target_modules=["embed_tokens", "v_proj"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merge_equals_peft_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    arch, extra = ("qwen2", dict(tie_word_embeddings=False)) if "bias" in kind else ("llama", dict[str, bool]())
    base = save_tiny_model(tmp_path / "base", arch, dtype=dtype, shard_size=SHARDED, **extra)
    adapter = make_adapter(base, tmp_path / "adapter", dtype=dtype, **ADAPTERS[kind])
    merge_adapter(adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", peft_merge(base, adapter))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_merge_equals_peft_for_every_architecture(tmp_path: Path, arch: str) -> None:
    base = save_tiny_model(tmp_path / "base", arch)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", peft_merge(base, adapter))


def test_merge_equals_peft_when_adapter_is_saved_in_bf16_and_rows_are_sliced(tmp_path: Path, monkeypatch) -> None:
    base = save_tiny_model(tmp_path / "base", hidden_size=256, intermediate_size=600)
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, adapter / "adapter_model.safetensors", {"format": "pt"})

    def halves(weight: torch.Tensor):
        return [slice(0, weight.shape[0] // 2), slice(weight.shape[0] // 2, None)]

    monkeypatch.setattr(saved_adapter, "_row_slices", halves)
    merge_adapter(adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", peft_merge(base, adapter))


def test_merge_keeps_shards_and_metadata(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", shard_size=SHARDED)
    (base / "generation_config.json").write_text('{"temperature": 0.3}')
    (base / "tokenizer_config.json").write_text('{"from": "base"}')
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    report = merge_adapter(adapter, tmp_path / "out")
    files = sorted(path.name for path in base.glob("model*"))
    assert len(files) > 2
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == files
    for name in files[:-1]:
        with safe_open(base / name, "pt") as old, safe_open(tmp_path / "out" / name, "pt") as new:
            assert list(old.offset_keys()) == list(new.offset_keys())
            assert old.metadata() == new.metadata()
            for key in old.offset_keys():
                assert torch.equal(old.get_tensor(key), new.get_tensor(key)) == ("q_proj" not in key)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((base / index).read_text())
    assert (report.num_low_rank, report.num_replaced) == (2, 0)
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["into"] == report.into
    assert "original" in report.into


def test_merge_takes_new_tokens_and_the_adapters_tokenizer(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", shard_size=SHARDED)
    saved: dict[str, Any] = dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    adapter = make_adapter(base, tmp_path / "adapter", vocab_size=270, **saved)
    (base / "added_tokens.json").write_text("{}")
    (adapter / "tokenizer_config.json").write_text('{"from": "adapter"}')
    report = merge_adapter(adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", peft_merge(base, adapter, vocab_size=270))
    assert report.vocab_size == 270
    assert "adapter" in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert not (tmp_path / "out" / "added_tokens.json").exists()


@pytest.mark.parametrize("modules_to_save", [["embed_tokens"], ["lm_head"]])
def test_merge_unties_embeddings_that_diverged_as_peft_does(tmp_path: Path, modules_to_save: list[str]) -> None:
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True, shard_size=SHARDED)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=modules_to_save)
    report = merge_adapter(adapter, tmp_path / "out")
    assert report.untied_embeddings
    assert_same_model(tmp_path / "out", peft_merge(base, adapter))


def test_merge_keeps_embeddings_tied_that_were_trained_tied(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True, shard_size=SHARDED)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    report = merge_adapter(adapter, tmp_path / "out")
    assert not report.untied_embeddings
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_model(tmp_path / "out", peft_merge(base, adapter))


def test_merge_of_a_tied_head_leaves_the_embedding_alone(tmp_path: Path) -> None:
    """PEFT cannot do this one: it adds the update of the head to the storage that the embedding shares. The
    reference is therefore the unmerged model, whose logits agree to float32 rounding."""
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True, dtype=torch.float32)
    adapter = make_adapter(base, tmp_path / "adapter", dtype=torch.float32, target_modules=["lm_head"])
    merge_adapter(adapter, tmp_path / "out")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_merge_into_dequantized_base_equals_stock_quantisation_then_peft(tmp_path, double_quant, targets) -> None:
    """The reference: the base that stock bitsandbytes dequantises, merged by PEFT."""
    base = save_tiny_model(tmp_path / "base", shard_size=SHARDED)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        llm_int8_skip_modules=["v_proj", "lm_head"],
    )  # fmt: skip
    report = merge_adapter(adapter, tmp_path / "out", into="dequantized", quantization_config=config)
    stock = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    expected = PeftModel.from_pretrained(stock.dequantize(), adapter).merge_and_unload().state_dict()
    assert_same_model(tmp_path / "out", expected)
    assert report.num_dequantized == 2 * 6
    assert "dequantised" in report.into


def test_merge_casts_to_dtype_first(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", dtype=torch.float32)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "out", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
    assert_same_model(tmp_path / "out", model.merge_and_unload().state_dict())


def test_merge_interrupted_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    base = save_tiny_model(tmp_path / "base", shard_size=SHARDED)
    adapter = make_adapter(base, tmp_path / "adapter")
    original, calls = saved_adapter.SavedAdapter.tensor, []

    def fail_late(self, key: str) -> torch.Tensor:
        calls.append(key)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(self, key)

    monkeypatch.setattr(saved_adapter.SavedAdapter, "tensor", fail_late)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def _edit_config(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": (dict(peft_type="IA3"), "IA3"),
    "init": (dict(init_lora_weights="pissa"), "pissa"),
    "fan_in_fan_out": (dict(fan_in_fan_out=True), "fan_in_fan_out"),
    "tokens": (dict(trainable_token_indices=[1]), "trainable_token_indices"),
    "rank": (dict(r=5), "rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_merge_refuses_adapters_it_cannot_merge(tmp_path: Path, case: str) -> None:
    changes, word = REFUSED[case]
    base = save_tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    _edit_config(adapter, **changes)
    with pytest.raises(ConfigError, match=word):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_refuses_a_base_without_the_adapters_layers(tmp_path: Path) -> None:
    adapter = make_adapter(save_tiny_model(tmp_path / "deep", num_hidden_layers=3), tmp_path / "adapter")
    base = save_tiny_model(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"layers\.2\.self_attn\.q_proj"):
        merge_adapter(adapter, tmp_path / "out", base_model=base)


def test_merge_refuses_other_shapes_and_half_resized_vocabularies(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    wide = save_tiny_model(tmp_path / "wide", intermediate_size=232)
    adapter = make_adapter(wide, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="gate_proj|up_proj|down_proj"):
        merge_adapter(adapter, tmp_path / "out", base_model=base)
    assert not (tmp_path / "out.incomplete").exists()
    half = make_adapter(base, tmp_path / "half", vocab_size=270, target_modules=["q_proj"])
    tensors = load_file(half / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "lm_head" not in k}, half / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="270"):
        merge_adapter(half, tmp_path / "out")


def test_merge_refuses_wrong_requests(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        merge_adapter(adapter, tmp_path / "full")
    with pytest.raises(ConfigError, match="quantization_config"):
        merge_adapter(adapter, tmp_path / "out", into="dequantized")
    with pytest.raises(ConfigError, match="into="):
        merge_adapter(adapter, tmp_path / "out", into="elsewhere")
    (base / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="pickle"):
        merge_adapter(adapter, tmp_path / "out")


def test_merge_command_compares_with_the_unmerged_model(tmp_path: Path, capsys) -> None:
    """fp32 weights: the merged model's divergence from the unmerged one is rounding, far below 1e-6 nats."""
    import argparse

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hf_fsdp_qlora.commands import merge

    base = save_tiny_model(tmp_path / "base", dtype=torch.float32)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "to": 1, "be": 2, "or": 3, "not": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", dtype=torch.float32)
    (tmp_path / "text").write_text("to be or not to be that is the question")
    parser = argparse.ArgumentParser()
    merge.register(parser.add_subparsers())
    line = ["merge", str(adapter), "--output", str(tmp_path / "out"), "--text", str(tmp_path / "text"), "--json"]
    assert merge.run(parser.parse_args(line)) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    assert found["num_tokens"] == 9
    assert abs(found["kl_divergence"]) < 1e-6
    assert found["loss_merged"] == pytest.approx(found["loss_unmerged"], abs=1e-5)


def test_merge_command_takes_other_block_sizes(tmp_path: Path, capsys) -> None:
    import argparse

    from hf_fsdp_qlora.commands import merge

    base = save_tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    parser = argparse.ArgumentParser()
    merge.register(parser.add_subparsers())
    line = ["merge", str(adapter), "--output", str(tmp_path / "out"), "--into", "dequantized"]
    with pytest.raises(ConfigError, match="--quant-type"):
        merge.run(parser.parse_args(line))
    for alone in (["--double-quant"], ["--block-size", "128"]):
        with pytest.raises(ConfigError, match="no effect without --quant-type"):
            merge.run(parser.parse_args([*line, *alone]))
    line += ["--quant-type", "fp4", "--block-size", "128"]
    with pytest.raises(ConfigError, match="block size 64"):
        merge.run(parser.parse_args([*line, "--text", str(base / "config.json")]))
    assert merge.run(parser.parse_args(line)) == 0
    assert "fp4/block=128" in capsys.readouterr().out


def test_merge_reads_scaling_as_peft_does() -> None:
    """The pattern match is ours; PEFT's is the reference."""
    patterns = {"q_proj": 1, "layers.1.*": 2, r"mlp\.up_proj": 3}
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "x_proj"]
    for name in names:
        key = peft.utils.other.get_pattern_key(list(patterns), name)
        assert saved_adapter._by_pattern(patterns, name, 9) == patterns.get(key, 9)
