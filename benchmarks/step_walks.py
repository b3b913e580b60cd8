"""What the Trainer's walks over all modules cost per step, torch's and ours (trainer_compat/walks.py). On the CPU.

    PYTHONPATH=. python benchmarks/step_walks.py

A tiny model of 32 layers with LoRA on every linear layer has as many modules as one of 8B. Milliseconds, the median of
50: `train()`, `zero_grad()` with gradients that are None, and `parameters()` as clipping goes through them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_fsdp_qlora import load_model

CONFIG = LlamaConfig(
    num_hidden_layers=32,
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
)
REPEATS = 50


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(CONFIG).save_pretrained(folder)
        ours, of_torch = (
            load_model(folder, peft_config=LoraConfig(target_modules="all-linear"), dtype=torch.float32, fsdp="none")
            for _ in range(2)
        )
    use_torch(of_torch)
    print(f"{sum(1 for _ in ours.modules()):,} modules, {sum(1 for _ in ours.parameters()):,} parameters")
    print("| walk | torch ms | ours ms |\n| --- | --- | --- |")
    walks: dict[str, Callable[[Any], object]] = {
        "train()": lambda model: model.train(),
        "zero_grad()": lambda model: model.zero_grad(),
        "parameters()": lambda model: list(model.parameters()),
    }
    for name, walk in walks.items():
        print(f"| {name} | {milliseconds(walk, of_torch):.2f} | {milliseconds(walk, ours):.2f} |")


def use_torch(model: nn.Module) -> None:
    """Take our loops away from one model."""
    del model.parameters
    for module in model.modules():
        vars(module).pop("train", None)


def milliseconds(walk: Callable[[Any], object], model: nn.Module) -> float:
    """The median over `REPEATS`."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        walk(model)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    main()
