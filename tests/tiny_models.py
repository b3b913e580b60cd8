"""Tiny random models of every supported architecture, saved the way `save_pretrained` saves real ones."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

COMMON = dict(
    vocab_size=259, hidden_size=96, intermediate_size=224, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

# Sizes are chosen so that some weights are smaller than a row, some end in the middle of a row and of a block.
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", dict(COMMON)),
    "mistral": ("MistralConfig", dict(COMMON, sliding_window=64)),
    "qwen2": ("Qwen2Config", dict(COMMON, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(COMMON, head_dim=24)),
    "gemma2": ("Gemma2Config", dict(COMMON, head_dim=24, sliding_window=64)),
    "gemma3": ("Gemma3TextConfig", dict(COMMON, head_dim=24, sliding_window=64)),
    "phi3": ("Phi3Config", dict(COMMON)),
    "olmo2": ("Olmo2Config", dict(COMMON)),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
}


def make_config(name: str, **overrides: object) -> transformers.PretrainedConfig:
    """The tiny config of one architecture."""
    class_name, values = ARCHITECTURES[name]
    return getattr(transformers, class_name)(**{**values, **overrides})


def save_tiny_model(
    path: Path, name: str = "llama", *, dtype: torch.dtype = torch.bfloat16, shard_size: str = "5GB", **overrides
) -> Path:
    """Save a random model of that architecture to `path` and return it. Norms and biases are random too, so that a
    tensor read from the wrong place cannot go unnoticed."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(name, **overrides), dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5 if key.endswith("weight") else 0.0, std=0.2)
    model.to(dtype).save_pretrained(path, max_shard_size=shard_size)
    return path
