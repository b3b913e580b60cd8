"""`make demo`: the whole path in about two minutes on two CPU cores, or on the machine's GPUs.

Builds a tiny base model, launches `recipes/sft.py` on two processes as a user would, prints what it cost and brought,
and loads the adapter on the stock stack to show that the held-out loss is the same there. Everything is written under
.demo/; the base model is kept for the next run (`make clean-demo` removes it).
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]  # a script's folder is on the path, the checkout is not

from recipes.demo.base_model import build_base_model, write_data  # noqa: E402
from recipes.demo.stock_eval import stock_eval_loss  # noqa: E402

WORK = Path(".demo")
TOLERANCE = 1e-3
MIB = 2**20


def main() -> int:
    """Run the demo. Returns 0 when training helped and the stock stack agrees, else 1."""
    os.chdir(ROOT)
    console = Console()
    num_gpus = torch.cuda.device_count()
    start = time.monotonic()
    WORK.mkdir(exist_ok=True)
    write_data(WORK)
    if not (WORK / "base" / "config.json").is_file():
        console.print("[bold]1/3[/] pretraining a tiny Llama on the standard library's sources")
        loss = build_base_model(WORK / "base", device="cuda" if num_gpus else "cpu")
        console.print(f"    loss {loss:.2f} on source code")
    command = launch_command(num_gpus)
    console.print(f"[bold]2/3[/] QLoRA on the language reference, sharded:\n    {' '.join(command[1:])}")
    # Upstream's deprecation notes and tokenisation bars would bury the few lines that matter here.
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run(command, check=True, env={**os.environ, **quiet})
    console.print("[bold]3/3[/] loading the adapter on stock transformers, bitsandbytes and PEFT")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    disable_progress_bars()
    reloaded = stock_eval_loss(
        str(WORK / "base"), str(WORK / "adapter"), str(WORK / "eval.jsonl"),
        dtype=torch.bfloat16 if num_gpus else torch.float32, output_dir=str(WORK / "stock"),
    )  # fmt: skip
    before, after = show(console, read_results(WORK / "adapter"), reloaded)
    console.print(f"{time.monotonic() - start:.0f} s in all; the adapter is in {WORK / 'adapter'}")
    if abs(after - reloaded) > TOLERANCE or not after < before:
        console.print(f"[red]The held-out loss must fall, and be the same to {TOLERANCE} on the stock stack.[/]")
        return 1
    return 0


def launch_command(num_gpus: int) -> list[str]:
    """What a user would type: two processes, or one when there is one GPU."""
    config, processes = ("fsdp2", min(num_gpus, 2)) if num_gpus else ("cpu_fsdp2", 2)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", str(processes)]
    command += ["--main_process_port", "0", "recipes/sft.py", "--config", "recipes/demo/sft.yaml"]
    return [*command, "--dtype", "bfloat16", "--bf16", "true"] if num_gpus else command


def read_results(adapter: Path) -> dict[str, Any]:
    """What the training left beside the adapter: `log` (the trainer's history) and `load` (load_model's report)."""
    state = json.loads((adapter / "trainer_state.json").read_text(encoding="utf-8"))
    report = json.loads((adapter / "load_report.json").read_text(encoding="utf-8"))
    return {"log": state["log_history"], "load": report}


def show(console: Console, results: dict[str, Any], reloaded: float) -> tuple[float, float]:
    """Print the table. Returns the held-out loss before and after training."""
    log, load = results["log"], results["load"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    rates = [entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry]
    difference = abs(losses[-1] - reloaded)
    total_bytes = load["quantized_bytes"] + load["frozen_bytes"] + load["trainable_bytes"]
    table = Table(title="QLoRA on a sharded 4-bit model", show_header=False)
    table.add_row("held-out loss before", f"{losses[0]:.4f}")
    table.add_row("held-out loss after", f"{losses[-1]:.4f}")
    table.add_row("the adapter on the stock stack", f"{reloaded:.4f} (differs by {difference:.1e})")
    table.add_row("tokens/s, all ranks", f"{rates[-1]:,.0f}")
    for name, peak_gib in peak_memory(log).items():
        table.add_row(name, f"{peak_gib:.2f} GiB")
    table.add_row("quantised", f"{load['quantized_bytes'] / MIB:.2f} MiB in {load['quantized_layers']} linear layers")
    table.add_row("trainable", f"{load['trainable_bytes'] / MIB:.2f} MiB of adapters")
    table.add_row("sharded", f"{load['sharded_bytes'] / MIB:.2f} of {total_bytes / MIB:.2f} MiB")
    table.add_row("parameters held by rank 0", f"{load['local_bytes'] / MIB:.2f} MiB")
    console.print(table)
    return losses[0], losses[-1]


def peak_memory(log: list[dict[str, Any]]) -> dict[str, float]:
    """The most of each rank over the run, GPU where there is one, in GiB: what MemoryCallback put into the log."""
    keys = sorted({key for entry in log for key in entry if key.startswith("memory/")})
    kind = "gpu_peak_gib_rank" if any("gpu_peak" in key for key in keys) else "host_rss_gib_rank"
    what = "GPU" if kind.startswith("gpu") else "host"
    return {
        f"peak {what} memory, rank {key.rpartition('rank')[2]}": max(entry[key] for entry in log if key in entry)
        for key in keys
        if kind in key
    }


if __name__ == "__main__":
    sys.exit(main())
