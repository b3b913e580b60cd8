"""Rotary training beside full AdamW, LoRA and a fixed subset of layers, at equal tokens, on Shakespeare.

    python benchmarks/rotary_sweep.py --model path/to/base-13m --data path/to/data --results rows.jsonl [--seconds 560]

Settings are those of the reference rows of base-13m (see rotary_runs.py). Runs are small, so several processes share
a GPU, and they use all GPUs there are. Every row is appended to the results file as soon as it is there, and rows that
the file has are not run again: a sweep that ran out of time goes on with the same command.

Three stages, each from what the one before found:

1. int8, 3 layers: how long a visit lasts and whether it warms up, moments reset or kept, the embedding always active
   or taking turns.
2. Learning rates of every method and number of layers. A grid is extended until its best rate is not at its edge.
3. Two more seeds of the best of each; bf16 and NF4 with three seeds at int8's best learning rate, then at rates around
   it and three seeds of a better one; last, fp32 weights for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing as mp
from launch import describe_machine
from rotary_runs import Job, Setting, run_job
from rotary_table import Row, describe, final_loss, table
from shakespeare import read_packed

LENGTHS = (5, 15, 50)
MOMENTS = ("reset", "keep")
LAYERS = (1, 2, 3)
SEEDS = (0, 1, 2)
EMBEDDING_ON = ("embedding", "norm")
ROTARY_RATES = (5e-4, 1e-3, 2e-3)
OTHER_RATES = {"full": (1e-4, 2e-4, 3e-4, 5e-4, 1e-3), "lora 8": (1e-3, 2e-3, 4e-3), "lora 64": (5e-4, 1e-3, 2e-3)}
MAX_EXTENSIONS = 3

Study = Generator[list[Job], list[Row], list[Row]]
"""Yields jobs, is sent their rows, returns the rows that matter."""


class OutOfTime(Exception):
    """No time is left to start another run."""


def main(args: argparse.Namespace) -> None:
    print(describe_machine(), flush=True)
    workers = Workers(args)
    try:
        chosen = explore(workers)
        best = tune(workers, chosen)
        repeat(workers, best)
    except OutOfTime:
        print(f"\nout of time after {args.seconds:.0f} s; the same command goes on from {args.results}")
    finally:
        workers.stop()
    print(table(workers.rows.values(), args.steps))


def explore(workers: Workers) -> dict[str, Job]:
    """The best visits for each treatment of moments, at int8 and 3 layers."""
    base = Job("rotary", 0.0, layers=3, frozen="int8", always_active=EMBEDDING_ON)
    jobs = [
        replace(base, moments=moments, steps_per_block=steps, always_active=always)
        for moments in MOMENTS
        for steps, always in [*((steps, EMBEDDING_ON) for steps in LENGTHS), (LENGTHS[1], ("norm",))]
    ]
    jobs.append(replace(jobs[1], warmup=LENGTHS[1] // 5))
    found = [best_of(rows) for rows in workers.run([learning_rates(job, ROTARY_RATES) for job in jobs])]
    return {moments: as_job(best_of(r for r in found if r["moments"] == moments)) for moments in MOMENTS}


def tune(workers: Workers, chosen: dict[str, Job]) -> list[Job]:
    """Learning rates of everything else, with those visits. The best job of each row of the table, seed 0."""
    jobs = [(replace(job, layers=layers), ROTARY_RATES) for job in chosen.values() for layers in LAYERS]
    always = chosen["reset"].always_active
    jobs += [
        (Job("fixed", 0.0, layers=layers, frozen="int8", always_active=always), ROTARY_RATES) for layers in LAYERS
    ]
    for name, rates in OTHER_RATES.items():
        method, _, rank = name.partition(" ")
        jobs.append((Job(method, 0.0, rank=int(rank or 0)), rates))
    found = workers.run([learning_rates(job, rates) for job, rates in jobs])
    return [as_job(best_of(rows)) for rows in found]


def repeat(workers: Workers, best: list[Job]) -> None:
    """The other seeds, and the other formats."""
    rotary = [job for job in best if job.method == "rotary"]
    studies = [all_at_once([replace(job, seed=seed) for seed in SEEDS]) for job in best]
    studies += [tuned_anew(replace(job, frozen=frozen)) for frozen in ("nf4", "bf16") for job in rotary]
    workers.run(studies)
    three = next(job for job in rotary if job.layers == 3)
    workers.run([all_at_once([replace(three, seed=seed, dtype="float32") for seed in SEEDS])])


def all_at_once(jobs: list[Job]) -> Study:
    return (yield jobs)


def tuned_anew(job: Job) -> Study:
    """Every seed; then learning rates around the job's, and every seed of a better one."""
    rows = yield [replace(job, seed=seed) for seed in SEEDS]
    rows += yield from learning_rates(job, (job.lr / 2, job.lr, job.lr * 2))
    best = as_job(best_of(row for row in rows if row["seed"] == job.seed))
    return rows + (yield [replace(best, seed=seed) for seed in SEEDS])


def learning_rates(job: Job, rates: Iterable[float]) -> Study:
    """One seed at every rate; on from an edge by factors of two while the best is there."""
    rows: list[Row] = []
    todo = sorted(rates)
    for _ in range(1 + MAX_EXTENSIONS):
        rows += yield [replace(job, lr=rate) for rate in todo]
        tried, best = sorted(row["lr"] for row in rows), best_of(rows)["lr"]
        if best not in (tried[0], tried[-1]):
            break
        todo = [best / 2 if best == tried[0] else best * 2]
    return rows


def best_of(rows: Iterable[Row]) -> Row:
    return min(rows, key=final_loss)


def as_job(row: Row) -> Job:
    fields = {name: row[name] for name in Job.__dataclass_fields__}
    return Job(**{**fields, "always_active": tuple(fields["always_active"])})


@dataclass
class _Active:
    study: Study
    waiting: list[Job]
    result: list[Row] | None = None


class Workers:
    """Processes that take jobs from a queue, and the file of results.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.deadline = time.monotonic() + args.seconds
        self.results = Path(args.results)
        self.rows: dict[str, Row] = {}
        if self.results.exists():
            for line in self.results.read_text().splitlines():
                row = json.loads(line)
                self.rows[as_job(row).key] = row
        context = mp.get_context("spawn")
        self.jobs: Any = context.Queue()
        self.done: Any = context.Queue()
        data = {split: read_packed(args, split).cpu() for split in ("train", "eval")}
        data["eval"] = data["eval"][: args.eval_sequences]
        self.processes = [
            context.Process(target=_work, args=(self.jobs, self.done, args, data), daemon=True)
            for _ in range(args.workers)
        ]
        devices = visible_devices()
        for index, process in enumerate(self.processes):
            # A process keeps what is visible when it starts; setting a device in it would be too late for what reads
            # the number of devices while it is imported.
            with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": devices[index % len(devices)]} if devices else {}):
                process.start()

    def run(self, studies: list[Study]) -> list[list[Row]]:
        """Run studies side by side; what each returns."""
        active = [_Active(study, next(study)) for study in studies]
        queued: set[str] = set()
        while True:
            for entry in active:
                self._advance(entry)
            missing = [job for entry in active if entry.result is None for job in entry.waiting]
            if not missing:
                return [entry.result for entry in active if entry.result is not None]
            for job in missing:
                if job.key not in self.rows and job.key not in queued:
                    queued.add(job.key)
                    self.jobs.put(job)
            self._receive()

    def stop(self) -> None:
        """End the processes, in the middle of runs too."""
        for process in self.processes:
            process.terminate()

    def _advance(self, entry: _Active) -> None:
        """Send a study its rows for as long as all are there."""
        while entry.result is None and all(job.key in self.rows for job in entry.waiting):
            try:
                entry.waiting = entry.study.send([self.rows[job.key] for job in entry.waiting])
            except StopIteration as end:
                entry.result = end.value

    def _receive(self) -> None:
        while self.done.empty():
            if time.monotonic() > self.deadline:
                raise OutOfTime
            dead = [process.exitcode for process in self.processes if process.exitcode]
            if dead:
                raise SystemExit(f"a worker died with exit code {dead[0]}; its error is above")
            time.sleep(0.02)
        row = json.loads(self.done.get())
        self.rows[as_job(row).key] = row
        with open(self.results, "a") as file:
            file.write(json.dumps(row) + "\n")
        reached = f"lr {row['lr']:.1e} seed {row['seed']} {final_loss(row):.4f} {row['seconds']:5.1f} s"
        print(f"{describe(row):64} {reached}", flush=True)


def visible_devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _work(jobs: Any, done: Any, args: argparse.Namespace, data: dict[str, torch.Tensor]) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    eval_at = tuple(step for step in (100, 200, 300) if step < args.steps) + (args.steps,)
    setting = Setting(
        args.model, data["train"].to(device), data["eval"].to(device), args.steps, args.batch, eval_at
    )  # fmt: skip
    while True:
        done.put(json.dumps(run_job(jobs.get(), setting)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of base-13m, or another causal language model")
    parser.add_argument("--data", required=True, help="folder with shakespeare_train.jsonl and shakespeare_eval.jsonl")
    parser.add_argument("--results", required=True, help="file of rows, one JSON object a line; kept and gone on with")
    parser.add_argument("--workers", type=int, default=14, help="processes that share the GPUs")
    parser.add_argument("--seconds", type=float, default=560, help="after which no result is waited for")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--eval-sequences", type=int, default=None, help="fewer than all, to try it out")
    main(parser.parse_args())
