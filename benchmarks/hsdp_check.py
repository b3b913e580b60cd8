"""HSDP beside one process: bytes, losses and adapters of two replicas of two ranks.

    python benchmarks/hsdp_check.py              (PYTHONPATH=. in front where the package is not installed)

Four ranks share one GPU, or have one each; without a GPU they run on the CPU. Every rank gathers every quantised layer
and compares it with bitsandbytes on the whole tensor, then the stock SFTTrainer takes four steps in bf16 with fp32
adapters. The model is a tiny random Llama made on the spot. The exit status is 1 if anything misses its limit.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from integrity_ours import count_differing, expect, plain_name
from launch import FSDP2_ENV, describe_machine, run_ranks
from peft import LoraConfig
from stock_trainer import logged, make_trainer
from tiny_llama import SMALL, four_bit, linear_weights, save_tiny_llama, tokens
from torch.distributed.tensor import DTensor

from hf_fsdp_qlora import QuantizedLinear, load_model
from hf_fsdp_qlora.sharding import gathered_rows

STEPS = 4
DTYPE = torch.bfloat16
LOSS_LIMIT = 5e-3
"""Relative, as in byte_integrity.py: rounding of bf16, 2**-8 per value, averaged out."""
HSDP_ENV = {
    **FSDP2_ENV,
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_CPU": str(not torch.cuda.is_available()).lower(),
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
"""What the shipped multi_node.yaml makes `accelerate launch` set, for two replicas of two ranks."""


def story(folder: str, output_dir: str) -> dict[str, Any]:
    """What one rank saw."""
    model: Any = load_model(
        folder, quantization_config=four_bit(DTYPE), dtype=DTYPE,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    expected, differing, compared = linear_weights(folder), 0, 0
    for group in gathered_rows(model):
        for layer in group:
            assert isinstance(layer, QuantizedLinear)
            weight = expected[names[id(layer)]].to(layer.weight.device, DTYPE)
            wrong, count = count_differing(layer, expect(weight))
            differing, compared = differing + int(wrong), compared + count
    trainer = make_trainer(model, output_dir, tokens(), max_steps=STEPS, save_strategy="no")
    trainer.train()
    shapes = {tuple(p.device_mesh.shape) for p in model.parameters() if isinstance(p, DTensor)}
    return {
        "differing": differing, "compared": compared, "losses": logged(trainer, "loss"),
        "read_bytes": model.load_report.read_bytes, "mesh": sorted(shapes),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
    }  # fmt: skip


def main() -> int:
    """Print both runs and what differs. Returns the exit status."""
    print(describe_machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_tiny_llama(folder, **SMALL)
        [one] = run_ranks(story, str(folder), f"{temporary}/one", world_size=1, process_group=False)
        ranks = run_ranks(story, str(folder), f"{temporary}/hsdp", world_size=4, env=HSDP_ENV)
    worst = max(abs(a / b - 1) for rank in ranks for a, b in zip(rank["losses"], one["losses"], strict=True))
    read = [sum(rank["read_bytes"] for rank in replica) for replica in (ranks[:2], ranks[2:])]
    differing = sum(rank["differing"] for rank in (one, *ranks))
    print(f"mesh {ranks[0]['mesh']}; {differing} of {sum(rank['compared'] for rank in (one, *ranks))} bytes differ")
    print(f"losses of one process {one['losses']}")
    print(f"losses of four ranks  {ranks[0]['losses']}, at most {worst:.1e} apart")
    print(f"bytes read: {one['read_bytes']} by one process, {read} by the replicas")
    return int(differing > 0 or worst > LOSS_LIMIT or read != [one["read_bytes"]] * 2 or ranks[0]["mesh"] != [(2, 2)])


if __name__ == "__main__":
    sys.exit(main())
