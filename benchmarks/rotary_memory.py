"""Rotary training at 8B shape on one GPU: bytes per parameter, and the time of a step by the lowest active layer.

    python3 benchmarks/rotary_memory.py --folder /dev/shm

Writes a random bf16 Llama of that shape (16 GB), then trains it through the stock SFTTrainer, each case in a process
of its own: int8 frozen, 10 % active, bf16 masters with stochastic rounding, gradient checkpointing, with 8-bit and
with fp32 moments; and for the times, all layers active over an unquantised model: full training with the same masters
and 8-bit moments (6 bytes per parameter: for a smaller card, --size 8layers). Not every visit of a sweep is made, but
some that are spread over it, from the embedding's to the head's.

Two peaks per case, as the allocator counts them, over all steps and rotations:

- `state`: what is held while no activation is: after backward (weights, gradients, moments), at its most during the
  optimizer's step and during rotations.
- `total`: at any time, activations included.

Step times are of forward, backward and optimizer, without rotation, as the median of the steps of a visit after its
first; a rotation is timed apart. The default batch is large enough for the GPU to be what a step waits for. Random
weights and tokens: only times and sizes mean anything.

A visit's figures are printed when it ends, so that a time limit takes back nothing. Processes start at once and import
while the model is written; they touch the GPU one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from launch import describe_machine
from planner_models import SIZES, write_checkpoint
from tiny_llama import make_tokenizer
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_fsdp_qlora import RotaryConfig, load_model, prepare_rotary
from hf_fsdp_qlora.rotary.plan import Plan
from hf_fsdp_qlora.rotary.schedule import Schedule


@dataclass(frozen=True)
class Case:
    """What is trained, and how many visits it is watched for."""

    optim: str
    active: str
    frozen: str
    visits: int


CASES = {
    "8-bit moments": Case("adamw_8bit", "10%", "int8", 7),
    "fp32 moments": Case("adamw_torch_fused", "10%", "int8", 3),
    "all active": Case("adamw_8bit", "100%", "bf16", 1),
}
STEPS_PER_BLOCK = 4
GIB = 2**30


def main() -> None:
    args = parse_arguments()
    if args.case:
        sys.stdin.readline()  # everything is imported; wait for the model and for the GPU
        run_case(args)
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    children = {case: start_case(folder, case, args) for case in args.cases or CASES}
    try:
        print(describe_machine(), flush=True)
        started = time.perf_counter()
        write_checkpoint(folder, args.size)
        print(f"wrote the model in {time.perf_counter() - started:.0f} s", flush=True)
        results = {}
        for case, child in children.items():
            started = time.perf_counter()
            print(f"\n{case}", flush=True)
            results[case] = finish_case(child, folder, case, args.case_seconds)
            print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    finally:
        for child in children.values():
            child.kill()
        shutil.rmtree(folder)
    show({case: result for case, result in results.items() if result is not None})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="all by default")
    parser.add_argument("--case-seconds", type=float, default=90, help="after which a case is cut off")
    parser.add_argument("--folder", help="where the model is written; the system's temporary folder by default")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def start_case(folder: Path, case: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--case", case, "--model", str(folder), "--seq-len", str(args.seq_len),
               "--batch", str(args.batch)]  # fmt: skip
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True)


def finish_case(child: subprocess.Popen[str], folder: Path, case: str, limit_s: float) -> dict[str, Any] | None:
    """Let a case use the GPU. What it found so far, or None if it got to nothing."""
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    try:
        if child.wait(limit_s):
            print(f"  failed with exit code {child.returncode}; its error is above")
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        print(f"  cut off after {limit_s:.0f} s")
    file = result_file(folder, case)
    return json.loads(file.read_text()) if file.exists() else None


def result_file(folder: Path, case: str) -> Path:
    return folder / f"{case}.result"


class SomeVisits(Schedule):
    """A number of visits of a sequential sweep, the first and the last among them; then again."""

    def __init__(self, plan: Plan, count: int) -> None:
        super().__init__(plan, order="sequential", seed=0, coverage_floor=0.0)
        last = len(plan.visits(plan.rotating)) - 1
        self.picked = sorted({round(last * index / max(1, count - 1)) for index in range(count)})

    def blocks_of_visit(self, visit: int) -> tuple[int, ...]:
        return super().blocks_of_visit(self.picked[visit % len(self.picked)])


def run_case(args: argparse.Namespace) -> None:
    case = CASES[args.case]
    config = RotaryConfig(active=case.active, frozen=case.frozen, master_dtype="bfloat16", order="sequential",
                          steps_per_block=STEPS_PER_BLOCK)  # fmt: skip
    model: Any = load_model(args.model, rotary=config, dtype=torch.bfloat16)
    rotary = prepare_rotary(model, config)
    rotary.schedule = schedule = SomeVisits(rotary.plan, case.visits)
    visits = len(schedule.picked)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, model.config.vocab_size, (64, args.seq_len), generator=generator).tolist()
    watch = Watch(rotary, visits, result_file(Path(args.model), args.case))
    with tempfile.TemporaryDirectory() as output:
        training = SFTConfig(
            output_dir=output, max_steps=visits * STEPS_PER_BLOCK, per_device_train_batch_size=args.batch,
            optim=case.optim, learning_rate=1e-5, gradient_checkpointing=True, max_length=args.seq_len,
            bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=training, train_dataset=Dataset.from_list([{"input_ids": row} for row in tokens]),
            processing_class=make_tokenizer(), callbacks=[watch.before, rotary.callback, watch],
            optimizer_cls_and_kwargs=rotary.optimizer(training),
        )  # fmt: skip
        with contextlib.suppress(Watched):
            trainer.train()


class Watched(Exception):
    """Everything was seen; parking all blocks at the end of training would take longer than the steps did."""


class Before(TrainerCallback):
    """Comes before the rotary callback, so that `on_step_end` is the beginning of a rotation."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.end_of_step()


class Watch(TrainerCallback):
    """Times and peaks of the phases of a step: forward and backward, optimizer, rotation. Prints those of each visit.

    Args:
        rotary: the run.
        visits: after how many to stop.
        file: to write what `report` returns to, after every visit.
    """

    def __init__(self, rotary: Any, visits: int, file: Path) -> None:
        self.rotary = rotary
        self.before = Before(self)
        self.visits = visits
        self.file = file
        self.seen: list[dict[str, Any]] = []
        self.rotations: list[float] = []
        self.peaks: dict[str, int] = {}
        self._steps: list[float] = []
        self._began_s = 0.0

    def mark(self, phase: str) -> float:
        """End a phase: keep its peak, begin to count anew. Returns the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began_s = self.mark("between steps")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.mark("forward and backward")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._steps.append(self.mark("optimizer step") - self._began_s)

    def end_of_step(self) -> None:
        self._began_s = self.mark("between steps")
        if len(self._steps) == STEPS_PER_BLOCK:
            self._end_of_visit()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = self.mark("rotation") - self._began_s
        if not self._steps:
            self.rotations.append(seconds)
            print(f"    rotation {seconds:.2f} s", flush=True)

    def _end_of_visit(self) -> None:
        plan, visit = self.rotary.plan, len(self.seen)
        lowest = min(self.rotary.schedule.blocks_of_visit(visit))
        # The first step of a visit allocates.
        self.seen.append({"lowest": lowest, "name": plan.blocks[lowest].name,
                          "step_s": statistics.median(self._steps[1:])})  # fmt: skip
        self._steps = []
        report = self.report()
        self.file.write_text(json.dumps(report))
        print(
            f"  from {self.seen[-1]['name']}: step {self.seen[-1]['step_s']:.3f} s; so far state "
            f"{report['state_bytes'] / plan.numel:.3f} bytes per parameter, "
            f"total {report['total_bytes'] / GIB:.2f} GiB",
            flush=True,
        )
        if len(self.seen) == self.visits:
            peaks = ", ".join(f"{phase} {peak / GIB:.2f}" for phase, peak in self.peaks.items())
            print(f"  {plan.numel / 1e9:.2f}B parameters; peaks by phase, GiB: {peaks}", flush=True)
            raise Watched

    def report(self) -> dict[str, Any]:
        return {
            "numel": self.rotary.plan.numel,
            "state_bytes": max(self.peaks.get(phase, 0) for phase in ("optimizer step", "rotation")),
            "total_bytes": max(self.peaks.values(), default=0),
            "visits": self.seen,
            "rotation_s": statistics.median(self.rotations) if self.rotations else None,
        }


def show(results: dict[str, dict[str, Any]]) -> None:
    print("\n| case | parameters | state, bytes per parameter | state GiB | total peak GiB | rotation s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case, result in results.items():
        numel, rotation = result["numel"], result["rotation_s"]
        print(
            f"| {case} | {numel / 1e9:.2f}B | {result['state_bytes'] / numel:.3f} | {result['state_bytes'] / GIB:.2f} "
            f"| {result['total_bytes'] / GIB:.2f} | {'' if rotation is None else f'{rotation:.2f}'} |"
        )
    full = results["all active"]["visits"][0]["step_s"] if "all active" in results else None
    print("\n| case | lowest active block | step s | over all active |\n| --- | --- | --- | --- |")
    for case, result in results.items():
        for visit in result["visits"]:
            share = "" if full is None else f"{visit['step_s'] / full:.2f}"
            print(f"| {case} | {visit['name']} | {visit['step_s']:.3f} | {share} |")


if __name__ == "__main__":
    main()
