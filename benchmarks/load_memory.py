"""Host memory of `load_model` while it loads, rank by rank, on a random checkpoint of at least 2 GB made on the spot.

    python benchmarks/load_memory.py [--layers 20] [--processes 1 2] [--folder DIR]

Every rank loads under FSDP2 with NF4, double quantisation and LoRA r=16. Memory is the kernel's RssAnon + RssShmem of
the process, sampled every 20 ms, minus what it was just before the call: private and shared memory that the process
allocated. Pages of the checkpoint that the kernel keeps in its page cache are no memory of a rank and not counted.
On CPU a rank's shard is part of that memory; what is above it must stay below 1 GiB + the largest tensor.

One weight per run is compared, bit for bit, with bitsandbytes on the whole tensor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from launch import FSDP2_ENV, describe_machine, run_ranks
from peak_memory import PeakMemory
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from hf_fsdp_qlora import load_model
from hf_fsdp_qlora.safetensors_stream import SafetensorsWriter, TensorInfo

LIMIT_BYTES = 2**30
FILE_BYTES = 2**30
CHECKED_WEIGHT = "model.layers.1.mlp.down_proj.weight"


@dataclass(frozen=True)
class Measured:
    """One rank's figures, in bytes: see the table's header."""

    shard: int
    peak: int
    read: int
    seconds: float


def main(args: argparse.Namespace) -> None:
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoint, largest = write_checkpoint(Path(folder), args.layers)
        print(f"checkpoint {checkpoint / 1e9:.2f} GB, largest tensor {largest / 2**20:.0f} MiB", flush=True)
        rows, too_much = [], []
        for processes in args.processes:
            ranks = run_ranks(measure, folder, world_size=processes, env=FSDP2_ENV)
            total_read = sum(rank.read for rank in ranks)
            for index, rank in enumerate(ranks):
                above = rank.peak - rank.shard
                rows.append(
                    f"{processes:5d} {index:4d} {mib(rank.shard)} {mib(rank.peak)} {mib(above)} {mib(rank.read)} "
                    f"{total_read / checkpoint:10.3f} {rank.seconds:6.1f}"
                )
                if above >= LIMIT_BYTES + largest:
                    too_much.append(f"rank {index} of {processes}")
    print("\nMiB. Above: peak minus shard. Total read: by all ranks, as a multiple of the checkpoint.")
    print("ranks rank    shard     peak    above     read total read      s")
    print("\n".join(rows))
    print(f"limit for above: {mib(LIMIT_BYTES + largest).strip()} MiB; {CHECKED_WEIGHT} equals bitsandbytes")
    if too_much:
        raise SystemExit(f"more memory than the limit: {', '.join(too_much)}")


def measure(folder: str) -> Measured:
    """Load on this rank and watch its memory; then check a weight."""
    with PeakMemory("RssAnon", "RssShmem") as memory:
        model = load_model(
            folder,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            ),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    owner = CHECKED_WEIGHT.removesuffix(".weight")
    layer = next(module for name, module in model.named_modules() if name.endswith(f"{owner}.base_layer"))
    ours = layer.dequantize()
    if not torch.equal(ours, bitsandbytes_weight(Path(folder), ours.device)):
        raise RuntimeError(f"{CHECKED_WEIGHT} is not what bitsandbytes makes of it")
    report = model.load_report
    shard = report.local_bytes if next(model.parameters()).device.type == "cpu" else 0
    return Measured(shard, memory.peak_bytes - memory.before_bytes, report.read_bytes, report.seconds)


def bitsandbytes_weight(folder: Path, device: torch.device) -> Tensor:
    """The checked weight, quantised and dequantised as one tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    with safe_open(folder / index["weight_map"][CHECKED_WEIGHT], "pt") as file:
        weight = file.get_tensor(CHECKED_WEIGHT).to(device)
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))


def write_checkpoint(folder: Path, layers: int) -> tuple[int, int]:
    """A random bf16 checkpoint in files of about 1 GiB, one tensor in memory at a time.

    Returns:
        Bytes of all tensors and of the largest.
    """
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=32000, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    infos = {name: TensorInfo(torch.bfloat16, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    files: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if sum(other.num_bytes for other in files[-1].values()) + info.num_bytes > FILE_BYTES:
            files.append({})
        files[-1][name] = info
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, content in enumerate(files, start=1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with SafetensorsWriter(folder / file_name, content, {"format": "pt"}) as writer:
            for name, info in content.items():
                writer.append(torch.empty(info.shape, dtype=info.dtype).normal_(0, 0.02, generator=generator))
                weight_map[name] = file_name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = [info.num_bytes for info in infos.values()]
    return sum(sizes), max(sizes)


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:8.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", help="where to make the temporary checkpoint (2.3 GB)")
    main(parser.parse_args())
