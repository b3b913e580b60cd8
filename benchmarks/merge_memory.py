"""Peak host memory of merge_adapter on a checkpoint of at least 2 GB, above what the imports alone take.

    python benchmarks/merge_memory.py [--layers 4] [--dora] [--into dequantized]

Builds a random Llama-8B-shaped checkpoint (fewer layers) and a rank-16 adapter on all its linear layers in a temporary
folder, merges on the CPU, and prints the process's peak resident memory before and during the merge.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peak_memory import PeakMemory
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from hf_fsdp_qlora.merge import merge_adapter
from hf_fsdp_qlora.safetensors_stream import SafetensorsWriter, TensorInfo

RANK = 16


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        checkpoint_bytes = write_base(base, args.layers)
        write_adapter(adapter, base, args.dora)
        into: dict[str, Any] = {}
        if args.into == "dequantized":
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
            into = dict(into="dequantized", quantization_config=config)
        with PeakMemory("VmRSS", sample_s=0.005) as memory:
            start = time.perf_counter()
            merge_adapter(adapter, Path(folder) / "out", **into)
            seconds = time.perf_counter() - start
        extra = memory.peak_bytes - memory.before_bytes
        print(
            f"checkpoint {checkpoint_bytes / 1e9:.2f} GB, {'DoRA' if args.dora else 'LoRA'} into {args.into}: "
            f"{seconds:.1f} s, resident before {memory.before_bytes / 2**20:.0f} MiB, "
            f"peak extra {extra / 2**20:.0f} MiB"
        )


def write_base(path: Path, layers: int) -> int:
    """A random bf16 checkpoint in one file per two layers or so; returns its bytes."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    infos = {name: TensorInfo(torch.bfloat16, tuple(t.shape)) for name, t in model.state_dict().items()}
    with SafetensorsWriter(path / "model.safetensors", infos, {"format": "pt"}) as writer:
        for info in infos.values():
            writer.append(torch.randn(info.shape, dtype=torch.bfloat16))
    return sum(info.num_bytes for info in infos.values())


def write_adapter(path: Path, base: Path, dora: bool) -> None:
    """A random adapter on every linear layer but the head."""
    path.mkdir()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, use_dora=dora, target_modules=names, base_model_name_or_path=str(base))
    config.save_pretrained(str(path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base))
    infos = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            key = f"base_model.model.{name}"
            infos[f"{key}.lora_A.weight"] = TensorInfo(torch.float32, (RANK, module.in_features))
            infos[f"{key}.lora_B.weight"] = TensorInfo(torch.float32, (module.out_features, RANK))
            if dora:
                infos[f"{key}.lora_magnitude_vector"] = TensorInfo(torch.float32, (module.out_features,))
    with SafetensorsWriter(path / "adapter_model.safetensors", infos, {"format": "pt"}) as writer:
        for info in infos.values():
            writer.append(torch.randn(info.shape))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--into", choices=("original", "dequantized"), default="original")
    parser.add_argument("--folder", help="where to make the temporary folder (needs twice the checkpoint)")
    main(parser.parse_args())
