"""The planner's predictions against what a GPU allocates, in many configurations at once.

    python benchmarks/planner_accuracy.py                 (PYTHONPATH=. in front where the package is not installed)
    python benchmarks/planner_accuracy.py --only 8b_b1 8b_b4
    python benchmarks/planner_accuracy.py --smoke         # tiny models; on a CPU it runs everything, measures nothing

Needs one 80 GB GPU, which configurations share: peak *allocated* memory is counted per process, so neighbours do not
disturb it. Ranks of a configuration share the GPU too. A configuration starts when its checkpoint is written and the
planner says that it fits beside those that run. Random checkpoints go to /dev/shm where it is large enough (35 GB).

Each loads with `load_model` and trains three steps with the stock SFTTrainer, in rotary training a sweep of short
visits, as the planner speaks of the most expensive one. Peaks of loading and of training are compared with
`estimate_memory`; that of every part of a step is printed beside the planner's, so that a miss can be understood from
one run: a part ends where the final norm runs forward, where gradients reach its output and its input, where they
reach the last decoder layer's input, and where the optimizer begins. The table has the rank that took most; where
ranks differ by more than 5 % before the first step, the large tensors of each are printed with what holds them. One
configuration's failure does not end the others; the exit status is 1 if one failed or missed by more than 5 %.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fsdp1_check import FSDP1_ENV
from launch import FSDP2_ENV, describe_machine, run_ranks
from planner_models import write_checkpoint
from planner_step import measure

from hf_fsdp_qlora.memory import MemoryEstimate, estimate_memory
from hf_fsdp_qlora.model_shape import model_shape

GIB = 2**30
LIMIT = 0.05
AT_ONCE = 6
"""Configurations; each costs cores while Python imports, and the cores are fewer than the gigabytes."""
USABLE = 0.92
"""Of the GPU's memory, for all configurations together by the planner's own figures."""


@dataclass(frozen=True)
class Run:
    """One line of the table: a model of planner_models.py, and what differs from the planner's default settings."""

    size: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str] | None:
        """What `accelerate launch` would set."""
        offload = {"FSDP_OFFLOAD_PARAMS": str(self.settings.get("offload") == "all").lower()}
        environments = {"fsdp2": FSDP2_ENV | offload, "fsdp1": FSDP1_ENV | offload}
        return environments.get(self.settings["engine"])

    @property
    def ranks(self) -> int:
        return self.settings.get("gpus", 1)


ACCUMULATE = dict(gradient_accumulation_steps=2)
COMPILED = dict(engine="none", compile_layers=True, batch_size=4)
ROTARY: dict[str, Any] = dict(method="rotary", active_fraction=0.1)
RUNS = {
    "8b_fsdp2_offload_all": Run("8b", dict(engine="fsdp2", offload="all")),
    "8b_fsdp2_offload_base": Run("8b", dict(engine="fsdp2", offload="base")),
    "8layers_fsdp1_2ranks": Run("8layers", dict(engine="fsdp1", gpus=2)),
    "8layers_fsdp2_2ranks": Run("8layers", dict(engine="fsdp2", gpus=2)),
    "8layers_ddp_2ranks": Run("8layers", dict(engine="ddp", gpus=2, **ACCUMULATE)),
    "70b_2layers_fsdp2_2ranks": Run("70b_2layers", dict(engine="fsdp2", gpus=2, seq_len=1024)),
    "8b_b1": Run("8b", dict(engine="none")),
    "8b_b4": Run("8b", dict(engine="none", batch_size=4)),
    "8b_r64_plain_absmax_adam8": Run(
        "8b", dict(engine="none", lora_r=64, double_quant=False, optimizer="adamw_bnb_8bit")
    ),
    "8b_stored": Run("8b", dict(engine="none", seq_len=512, gradient_checkpointing=False)),
    "8b_dropout_accumulate": Run("8b", dict(engine="none", lora_dropout=0.05, **ACCUMULATE)),
    "8b_fsdp2": Run("8b", dict(engine="fsdp2")),
    "8layers_int8": Run("8layers", dict(engine="none", quant_format="int8")),
    "8layers_hqq": Run("8layers", dict(engine="none", quant_format="hqq")),
    "8layers_prequantized": Run("8layers", dict(engine="none", prequantized=True)),
    "8layers_lora_16bit": Run("8layers", dict(engine="none", method="lora")),
    "8layers_padded": Run("8layers", dict(engine="none", batch_size=4, seq_len=1024, padded=True)),
    "8layers_fsdp2_2ranks_offload_base": Run("8layers", dict(engine="fsdp2", gpus=2, offload="base")),
    "1b_long": Run("1b", dict(engine="none", seq_len=8192)),
    "1b_head": Run("1b", dict(engine="none", modules_to_save=("lm_head",))),
    "1b_lora_16bit_b16": Run("1b", dict(engine="none", method="lora", batch_size=16)),
    "1b_compiled_0": Run("1b", COMPILED | dict(activation_budget=0.0, batch_size=8)),
    "1b_compiled_0.4": Run("1b", COMPILED | dict(activation_budget=0.4)),
    "1b_compiled_padded_0.7": Run("1b", COMPILED | dict(activation_budget=0.7, padded=True)),
    "1b_compiled_lora_16bit_1": Run("1b", COMPILED | dict(activation_budget=1.0, method="lora")),
    "1b_rotary_b1": Run("1b", dict(engine="none", **ROTARY)),
    "1b_rotary_b16": Run("1b", dict(engine="none", batch_size=16, **ROTARY)),
    "1b_rotary_stored": Run("1b", dict(engine="none", batch_size=2, gradient_checkpointing=False, **ROTARY)),
    "1b_rotary_ddp_2ranks": Run("1b", dict(engine="ddp", gpus=2, batch_size=8, **ROTARY)),
}
SMOKE = {
    "tiny": Run("tiny", dict(engine="none", seq_len=64)),
    "tiny_compiled": Run("tiny", dict(engine="none", seq_len=64, compile_layers=True, activation_budget=0.4)),
    "tiny_prequantized": Run("tiny", dict(engine="none", seq_len=64, prequantized=True)),
    "tiny_hqq": Run("tiny", dict(engine="none", seq_len=64, quant_format="hqq", modules_to_save=("lm_head",))),
    "tiny_padded": Run("tiny", dict(engine="none", seq_len=64, batch_size=2, padded=True, quant_format="int8")),
    "tiny_fsdp2_2ranks": Run("tiny", dict(engine="fsdp2", seq_len=64, gpus=2, **ACCUMULATE)),
    "tiny_rotary": Run("tiny", dict(engine="none", seq_len=64, **ROTARY)),
    "tiny_rotary_ddp_2ranks": Run("tiny", dict(engine="ddp", seq_len=64, gpus=2, **ROTARY | ACCUMULATE)),
    "tiny_ddp_2ranks": Run("tiny", dict(engine="ddp", seq_len=64, gpus=2)),
    "tiny_fsdp1_2ranks": Run("tiny", dict(engine="fsdp1", seq_len=64, gpus=2)),
}


def main(args: argparse.Namespace) -> int:
    known = SMOKE if args.smoke else RUNS
    runs = {name: known[name] for name in args.only or known}
    print(describe_machine(), flush=True)
    started, failed = time.perf_counter(), []
    lines: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(dir=args.folder or best_folder()))
    try:
        with ThreadPoolExecutor(4) as writers, ThreadPoolExecutor(AT_ONCE if torch.cuda.is_available() else 1) as pool:
            sizes = dict.fromkeys(run.size for run in runs.values())
            written = {size: writers.submit(write_checkpoint, folder / size, size) for size in sizes}
            room = Room()
            futures = {pool.submit(one, run, folder / run.size, written[run.size], room): name
                       for name, run in runs.items()}  # fmt: skip
            for future in as_completed(futures):
                name = futures[future]
                try:
                    estimate, results = future.result()
                except Exception:  # noqa: BLE001  (whatever it was, the other configurations go on)
                    failed.append(name)
                    print(f"\n{name} FAILED\n{traceback.format_exc()}", flush=True)
                    continue
                lines[name] = table_line(name, estimate, results)
                print(details(name, estimate, results), flush=True)
    finally:
        shutil.rmtree(folder)
    print("\n| run | training: predicted | measured | off | loading: predicted | measured | off |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines[name] for name in runs if name in lines))
    seconds = time.perf_counter() - started
    print(f"\n{len(lines)} configurations in {seconds:.0f} s; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed) or any("MISS" in line for line in lines.values()))


def one(run: Run, folder: Path, written: Future[None], room: Room) -> tuple[MemoryEstimate, list[dict[str, Any]]]:
    """A configuration in processes of its own, once its checkpoint is there and the GPU has room."""
    written.result()
    estimate = estimate_memory(model_shape(str(folder)), **run.settings)
    needed = run.ranks * (estimate.needed_bytes + GIB)
    with room.for_bytes(needed):
        results = run_ranks(
            measure, str(folder), estimate.settings, world_size=run.ranks, env=run.env,
            process_group=run.env is not None or run.ranks > 1,
        )  # fmt: skip
    return estimate, results


class Room:
    """Lets configurations begin while their predicted sum fits the GPU; one alone always may."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        self.limit = torch.cuda.get_device_properties(0).total_memory * USABLE if cuda else 0
        self.used = 0
        self.changed = threading.Condition()

    def for_bytes(self, needed: int) -> Any:
        """A context manager that waits for the room and gives it back."""
        return _Place(self, needed)


class _Place:
    def __init__(self, room: Room, needed: int) -> None:
        self.room, self.needed = room, needed

    def __enter__(self) -> None:
        with self.room.changed:
            self.room.changed.wait_for(lambda: not self.room.used or self.room.used + self.needed <= self.room.limit)
            self.room.used += self.needed

    def __exit__(self, *_: object) -> None:
        with self.room.changed:
            self.room.used -= self.needed
            self.room.changed.notify_all()


def best_folder() -> str | None:
    """/dev/shm if all checkpoints fit there twice over (training needs host memory too), else the default."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 60 * 10**9 else None


def table_line(name: str, estimate: MemoryEstimate, results: list[dict[str, Any]]) -> str:
    """The prediction beside the rank that took most."""
    peak, loading = (max(result[key] for result in results) for key in ("peak", "loading"))
    cells = [*compare(estimate.peak_bytes, peak), *compare(estimate.loading_peak_bytes, loading)]
    return f"| {name} | {' | '.join(cells)} |"


def compare(predicted: int, measured: int) -> list[str]:
    """Three cells: predicted, measured, how far off."""
    if not measured:
        return [f"{predicted / GIB:.2f} GiB", "no GPU", ""]
    off = predicted / measured - 1
    mark = " MISS" if abs(off) > LIMIT else ""
    return [f"{predicted / GIB:.2f} GiB", f"{measured / GIB:.2f} GiB", f"{off:+.1%}{mark}"]


def details(name: str, estimate: MemoryEstimate, results: list[dict[str, Any]]) -> str:
    """Everything the planner thought and every part of the step as measured, on all ranks."""

    def shown(values: dict[str, int]) -> str:
        return ", ".join(f"{key} {size / GIB:.3f}" for key, size in values.items() if size)

    lines = [
        f"\n{table_line(name, estimate, results)}  {results[0]['seconds']:.0f} s",
        f"  planner: {estimate.highest_moment}: {shown(estimate.gpu)}",
        f"  planner's moments: {shown(estimate.moments)}",
    ]
    for rank, result in enumerate(results):
        lines.append(f"  measured on rank {rank}: {shown(result['parts'])}; static {shown(result['static'])}")
    static = [next(iter(result["static"].values())) for result in results]
    if max(static) - min(static) > LIMIT * min(static):
        for rank, result in enumerate(results):
            lines += [f"  alive on rank {rank}: {line}" for line in result["alive"]]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models")
    parser.add_argument("--only", nargs="+", choices=[*RUNS, *SMOKE], help="some of the runs")
    parser.add_argument("--folder", help="where to write the temporary checkpoints")
    raise SystemExit(main(parser.parse_args()))
