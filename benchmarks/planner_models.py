"""Random checkpoints for planner_accuracy.py: shapes of known models, some with fewer layers, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from hf_fsdp_qlora.quantize_checkpoint import quantize_checkpoint
from hf_fsdp_qlora.safetensors_stream import SafetensorsWriter, TensorInfo

PIECE = 2**24  # elements of random values that every tensor repeats
_8B = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=1024),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "8b": dict(**_8B, num_hidden_layers=32, vocab_size=128256),
    "8layers": dict(**_8B, num_hidden_layers=8, vocab_size=128256),
    "70b_2layers": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64,
                        num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip


def write_checkpoint(folder: Path, size: str) -> None:
    """A random bf16 checkpoint, written tensor by tensor in the order of transformers' files (by name)."""
    sizes: dict[str, Any] = dict(SIZES[size])
    config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16", max_position_embeddings=8192)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    infos = {name: TensorInfo(torch.bfloat16, tuple(t.shape)) for name, t in sorted(model.state_dict().items())}
    values = (torch.randn(PIECE) * 0.02).bfloat16().view(torch.uint8).numpy().data
    with SafetensorsWriter(folder / "model.safetensors", infos, {"format": "pt"}) as writer:
        for info in infos.values():
            for start in range(0, info.num_bytes, len(values)):
                writer.append_bytes(values[: info.num_bytes - start])


def quantize_folder(folder: Path, output: Path, *, double_quant: bool) -> None:
    """The same checkpoint in bitsandbytes NF4, as hubs have it."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype="bfloat16",
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantize_checkpoint(str(folder), output, quantization_config=config, device=device)
