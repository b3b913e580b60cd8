"""Block expansion. Reference: the original model; logits are equal bit for bit, because a new layer adds zeros."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_fsdp_qlora import ConfigError, load_model
from hf_fsdp_qlora.cli import main
from hf_fsdp_qlora.expand import expand_checkpoint, read_expansion
from tests.loading_story import nf4
from tests.tiny_models import ARCHITECTURES, save_tiny_model
from tests.tiny_tokenizer import make_tokenizer

IDS = torch.arange(100).view(2, 50) + 3


@torch.no_grad()
def logits(path: Path, dtype: torch.dtype) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)(IDS).logits


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {key: tensor for file in path.glob("*.safetensors") for key, tensor in load_file(file).items()}


# Windows shorter than the text and layers of both kinds: a layer that changed its kind would change the logits.
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
EXTRA: dict[str, dict[str, Any]] = {"gemma3": {"sliding_window": 8, "layer_types": KINDS},
         "gemma2": {"sliding_window": 8}, "mistral": {"sliding_window": 8},
         "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_expanded_model_computes_exactly_what_the_original_does(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", name, num_hidden_layers=5, **EXTRA.get(name, {}))
    expansion = expand_checkpoint(base, tmp_path / "out", new_layers=2, max_shard_bytes=60_000)
    assert (expansion.new_layers, expansion.copied_from) == ((2, 6), (1, 4))
    assert torch.equal(logits(tmp_path / "out", dtype), logits(base, dtype))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.num_hidden_layers == 7
    if name in EXTRA and name != "mistral":
        old = transformers.AutoConfig.from_pretrained(base).layer_types
        assert config.layer_types == [old[index] for index in (0, 1, 1, 2, 3, 4, 4)] and len(set(old)) == 2
    assert read_expansion(tmp_path / "out") == expansion


def test_new_layers_are_copies_with_two_zero_projections(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "gpt_neox", num_hidden_layers=3, shard_size="100KB")
    expansion = expand_checkpoint(base, tmp_path / "out", new_layers=3)
    old, new = tensors_of(base), tensors_of(tmp_path / "out")
    assert expansion.new_layers == (1, 3, 5) and len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    per_layer = {key.partition("layers.0.")[2] for key in old if "layers.0." in key}
    assert len(new) == len(old) + 3 * len(per_layer)
    for key in per_layer:
        for index in range(3):
            source = old[f"gpt_neox.layers.{index}.{key}"]
            assert torch.equal(new[f"gpt_neox.layers.{2 * index}.{key}"], source)
            is_zero = key.startswith(("attention.dense.", "mlp.dense_4h_to_h."))
            copy = new[f"gpt_neox.layers.{2 * index + 1}.{key}"]
            assert torch.equal(copy, torch.zeros_like(source) if is_zero else source)
    assert sum(key.startswith(("attention.dense.", "mlp.dense_4h_to_h.")) for key in per_layer) == 4  # with biases


def test_expanded_model_quantises_and_keeps_new_layers_out(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", num_hidden_layers=10, dtype=torch.float32)
    expansion = expand_checkpoint(base, tmp_path / "out", new_layers=10)
    skip = expansion.new_modules  # layer 1 is new, 10 to 19 are both
    expanded = load_model(tmp_path / "out", quantization_config=nf4(llm_int8_skip_modules=skip), dtype=torch.float32)
    original = load_model(base, quantization_config=nf4(), dtype=torch.float32)
    assert expanded.load_report.quantized_layers == 70 and len(expanded.load_report.unquantized_linears) == 71
    with torch.no_grad():
        assert torch.equal(expanded(IDS).logits, original(IDS).logits)


def test_command_names_the_new_layers_and_copies_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_model(tmp_path / "base")
    make_tokenizer().save_pretrained(base)
    assert main(["expand", str(base), str(tmp_path / "out"), "--new-layers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1, model.layers.3" in printed and "self_attn.o_proj and mlp.down_proj" in printed
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in base.iterdir()} | {"expansion.json"}
    old, new = (json.loads((path / "config.json").read_text()) for path in (base, tmp_path / "out"))
    assert {key for key in new if new[key] != old.get(key)} == {"num_hidden_layers"}
    assert main(["expand", str(base), str(tmp_path / "out"), "--new-layers", "1"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    for count in ("0", "3"):
        assert main(["expand", str(base), str(tmp_path / "more"), "--new-layers", count]) == 2
        assert "takes 1 to 2" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_checkpoint_with_shorter_names_keeps_them(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    short = {key.removeprefix("model."): tensor for key, tensor in tensors_of(base).items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    expand_checkpoint(base, tmp_path / "out", new_layers=1)
    assert "layers.2.mlp.up_proj.weight" in tensors_of(tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out", torch.float32), logits(base, torch.float32))


def test_models_that_cannot_be_expanded_are_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="GPT2Block is no decoder layer .* known output projections"):
        expand_checkpoint(tmp_path / "gpt2", tmp_path / "out", new_layers=1)
    quantised = save_tiny_model(tmp_path / "quantised")
    values = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match="already quantised"):
        expand_checkpoint(quantised, tmp_path / "out", new_layers=1)
    shutil.rmtree(quantised)
    with pytest.raises(ConfigError, match="no expansion.json"):
        read_expansion(tmp_path / "gpt2")
