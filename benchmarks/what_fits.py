"""The tables of docs/what_fits.md: the planner's answer for known shapes and machines, and beside measurements.

    python benchmarks/what_fits.py            # print the tables
    python benchmarks/what_fits.py --write    # put them into docs/what_fits.md

No weights, no GPU and no network: shapes are written down here. A test checks that the page is what this prints.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.memory_settings import GIB, MemorySettings
from hf_fsdp_qlora.model_shape import ModelShape, model_shape
from hf_fsdp_qlora.planning import largest_activation_budget, largest_seq_len

PAGE = Path(__file__).parent.parent / "docs" / "what_fits.md"
BEGIN, END = "<!-- made by benchmarks/what_fits.py -->", "<!-- end -->"
MODELS: dict[str, dict[str, int]] = {
    "8B (Llama 3.1)": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                           num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072),
    "13B (Llama 2)": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                          num_key_value_heads=40, vocab_size=32000, max_position_embeddings=4096),
    "33B (LLaMA)": dict(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52,
                        num_key_value_heads=52, vocab_size=32000, max_position_embeddings=2048),
    "70B (Llama 3.1)": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                            num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072),
    "405B (Llama 3.1)": dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                             num_attention_heads=128, num_key_value_heads=8, vocab_size=128256,
                             max_position_embeddings=131072),
}  # fmt: skip
MACHINES = {"1 x 16": (1, 16), "1 x 24": (1, 24), "2 x 24": (2, 24), "4 x 16": (4, 16), "1 x 48": (1, 48),
            "4 x 24": (4, 24), "1 x 80": (1, 80), "2 x 80": (2, 80), "8 x 80": (8, 80)}  # fmt: skip
QLORA = MemorySettings(lora_r=16, seq_len=2048, gradient_accumulation_steps=2)


@dataclass(frozen=True)
class Measured:
    """A run of RESULTS.md and the same in the planner's words."""

    model: str
    what: str
    peak_gib: float
    settings: dict[str, Any] = field(default_factory=dict)


CARDS = (8, 12, 16, 24, 48, 80)
BATCHES = (1, 4)

ONE: dict[str, Any] = dict(engine="none", gradient_accumulation_steps=1)
COMPILED: dict[str, Any] = ONE | dict(compile_layers=True, adapter_dtype="bfloat16")
MEASURED = (
    Measured("8B (Llama 3.1)", "batch 1", 6.88, ONE),
    Measured("8B (Llama 3.1)", "batch 4", 9.75, ONE | dict(batch_size=4)),
    Measured("8B (Llama 3.1)", "r=64, plain absmax, 8-bit AdamW", 7.83,
             ONE | dict(lora_r=64, double_quant=False, optimizer="adamw_8bit")),
    Measured("8B (Llama 3.1)", "512 tokens, no checkpointing", 8.78,
             ONE | dict(seq_len=512, gradient_checkpointing=False)),
    Measured("8B (Llama 3.1)", "dropout, accumulation", 7.15,
             ONE | dict(lora_dropout=0.05, gradient_accumulation_steps=2)),
    Measured("8B (Llama 3.1)", "compiled, budget 0, bf16 adapters", 6.61, COMPILED | dict(activation_budget=0.0)),
    Measured("8B (Llama 3.1)", "compiled, budget 0.3, batch 4, bf16 adapters", 18.17,
             COMPILED | dict(activation_budget=0.3, batch_size=4)),
    Measured("8B (Llama 3.1)", "compiled, budget 0.4, batch 4, bf16 adapters", 21.17,
             COMPILED | dict(activation_budget=0.4, batch_size=4)),
    Measured("8B (Llama 3.1)", "compiled, budget 0.45, batch 4, bf16 adapters", 22.82,
             COMPILED | dict(activation_budget=0.45, batch_size=4)),
    Measured("8B (Llama 3.1)", "FSDP2, one rank", 7.54, ONE | dict(engine="fsdp2")),
    Measured("8B (Llama 3.1)", "FSDP2, one rank, rows in host memory", 4.19,
             ONE | dict(engine="fsdp2", offload="base")),
    Measured("33B (LLaMA)", "FSDP2, one rank, rows in host memory, 512 tokens", 3.32,
             ONE | dict(engine="fsdp2", offload="base", seq_len=512, prequantized=True)),
    Measured("33B (LLaMA)", "r=64, 512 tokens, paged 8-bit AdamW, bf16 adapters", 18.70,
             ONE | dict(lora_r=64, seq_len=512, optimizer="paged_adamw_8bit", adapter_dtype="bfloat16",
                        prequantized=True)),
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    tables = f"{fits_table()}\n\n{compiled_table()}\n\n{measured_table()}"
    if not args.write:
        print(tables)
        return
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def fits_table() -> str:
    """For every model and machine the fastest way that fits."""
    lines = [f"| QLoRA, GPUs x GiB | {' | '.join(MODELS)} |", f"| --- |{' --- |' * len(MODELS)}"]
    for machine, (gpus, gib) in MACHINES.items():
        cells = [_best(_shape(name), gpus, gib) for name in MODELS]
        lines.append(f"| {machine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compiled_table() -> str:
    """For every model and card the largest activation budget of compiled layers, for some batch sizes."""
    models = list(MODELS)[:-1]
    lines = [f"| compiled, one GPU of GiB | {' | '.join(models)} |", f"| --- |{' --- |' * len(models)}"]
    for gib in CARDS:
        cells = [", ".join(_budgets(_shape(name), gib)) or "no" for name in models]
        lines.append(f"| {gib} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured_table() -> str:
    """Peak allocated memory of runs on a GPU beside the planner's figure for the same."""
    lines = ["| run | measured | planner | off |", "| --- | --- | --- | --- |"]
    for run in MEASURED:
        estimate = estimate_memory(_shape(run.model), replace(QLORA, **run.settings))
        predicted = estimate.peak_bytes / GIB
        off = f"{predicted / run.peak_gib - 1:+.1%}"
        lines.append(f"| {run.model}, {run.what} | {run.peak_gib:.2f} GiB | {predicted:.2f} GiB | {off} |")
    return "\n".join(lines)


def _budgets(shape: ModelShape, gib: int) -> list[str]:
    found = []
    for batch_size in BATCHES:
        settings = replace(QLORA, engine="none", batch_size=batch_size)
        budget = largest_activation_budget(shape, settings, gib * GIB)
        if budget is not None:
            kept = replace(settings, compile_layers=True, activation_budget=budget)
            found.append(f"batch {batch_size}: {budget:g} ({estimate_memory(shape, kept).needed_bytes / GIB:.1f})")
    return found


def _best(shape: ModelShape, gpus: int, gib: int) -> str:
    whole = replace(QLORA, engine="none") if gpus == 1 else replace(QLORA, engine="ddp", gpus=gpus)
    sharded = replace(QLORA, engine="fsdp2", gpus=gpus)
    ways = {"one GPU" if gpus == 1 else "DDP": whole}
    ways |= {"FSDP2": sharded} if gpus > 1 else {}
    ways["rows in host memory"] = replace(sharded, offload="base")
    ways["all in host memory"] = replace(sharded, offload="all")
    for name, settings in ways.items():
        estimate = estimate_memory(shape, settings)
        if estimate.fits(gib * GIB):
            pinned = estimate.host["pinned"] / GIB
            host = f", {pinned:.0f} pinned" if pinned else ""
            tokens = largest_seq_len(shape, settings, gib * GIB)
            return f"{name}: {estimate.needed_bytes / GIB:.1f}{host}; {tokens:,} tokens"
    return "no"


@lru_cache
def _shape(name: str) -> ModelShape:
    values: dict[str, Any] = dict(MODELS[name])
    return model_shape(LlamaConfig(**values))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/what_fits.md")
    main(parser.parse_args())
