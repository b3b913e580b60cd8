"""What the wizard writes for six machines and every goal: does it validate, and does it train as it is?

    PYTHONPATH=. python benchmarks/wizard_check.py                          (on a machine with GPUs)
    PYTHONPATH=. python benchmarks/wizard_check.py --machines 1x141 2x24 --jobs 8   (eight trainings at a time)
    PYTHONPATH=. python benchmarks/wizard_check.py --shape tiny --goals qlora   (without GPUs)

For each machine and goal `hf-fsdp-qlora config --yes` gets the machine's figures as flags; its two files go through
`hf-fsdp-qlora validate`. Where this machine has as many GPUs as the profile, and they are large enough for what the
wizard planned, the command that the wizard printed is then run, with three steps, a log line per step and a temporary
output folder over the recipe. The processes see only as many GPUs as the profile has, and torch's allocator gives each
no more than the profile's memory of a card (PYTORCH_ALLOC_CONF). A probe says whether this torch does so ("cards
capped"); if not, runs have the whole card, and only the printed peak tells whether the plan was right.
The CUDA context is outside that count, and so are the link speeds and host memory of the real machine.

With `--jobs` above 1 several trainings share the GPUs, each within its own cap, as long as their plans and contexts
fit together; each starts on the GPUs with the most memory left. Peaks are per process and stay comparable; seconds do
not. Rows are printed as they become known, so not in the order of the cases.

Weights are random, in the shape of Llama-3.2-1B with a head of its own; the profile without GPUs has a tiny model. The
text is the alphabet, a byte a token, in rows of full length. "Trained" means: the command ended with status 0, and its
log has three finite losses and norms of gradients that are finite and not zero; the size of a loss means nothing. A
run has RUN_LIMIT_S seconds, SHARED_LIMIT_S where others may run beside it. Exit status 1 if a wizard, a validation or
a training failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from launch import describe_machine
from planner_models import SIZES, write_checkpoint
from wizard_runs import GIB, RUN_LIMIT_S, Cards, Conditions, Ended, cap, cap_holds, card_bytes, cores, run_command

from hf_fsdp_qlora import cli
from hf_fsdp_qlora.goals import GOALS
from tests.tiny_tokenizer import make_tokenizer

MACHINES: dict[str, tuple[int, int, int]] = {  # GPUs, GiB of a card, GiB of the host
    "1x24": (1, 24, 64), "2x24": (2, 24, 128), "4x16": (4, 16, 128), "8x80": (8, 80, 1024), "cpu": (0, 0, 32),
    "1x141": (1, 141, 256),
}  # fmt: skip
CLI = (sys.executable, "-m", "hf_fsdp_qlora.cli")
STEPS = 3
ROWS = 64
ROW_BYTES = 4096


@dataclass(frozen=True)
class Case:
    """One machine and goal, and the folder that has its files."""

    machine: str
    goal: str
    folder: Path
    model: Path
    data: Path

    @property
    def files(self) -> tuple[str, str]:
        """The accelerate config and the recipe."""
        return str(self.folder / "accelerate.yaml"), str(self.folder / "recipe.yaml")


@dataclass(frozen=True)
class Row:
    """What is known of a case, as a row of the table."""

    case: Case
    chosen: str = ""
    validates: str = ""
    trained: str = ""
    problem: str | None = None

    def __str__(self) -> str:
        return f"| {self.case.machine} | {self.case.goal} | {self.chosen} | {self.validates} | {self.trained} |"


def main() -> int:
    args = parse_arguments()
    print(describe_machine(), flush=True)
    started = time.perf_counter()
    failures = []
    with tempfile.TemporaryDirectory() as name:
        cases = list(make_cases(Path(name), args))
        conditions = Conditions(torch.cuda.is_available() and cap_holds(), Cards(), args.jobs)
        print(f"models and data: {time.perf_counter() - started:.0f} s; cards capped: {conditions.capped}", flush=True)
        with ThreadPoolExecutor(max(1, cores() // 2)) as wizards, ThreadPoolExecutor(args.jobs) as trainings:
            rows: list[Future[Row]] = [
                trainings.submit(finish, row, wizard, conditions)
                for row, wizard in map(look, cases, wizards.map(ask_wizard, cases))
            ]
            print(f"{len(cases)} wizards: {time.perf_counter() - started:.0f} s\n", flush=True)
            print("| machine | goal | chosen | validates | trained |\n| --- | --- | --- | --- | --- |", flush=True)
            for future in as_completed(rows):
                row = future.result()
                print(row, flush=True)
                failures += [f"{row.case.machine}, {row.case.goal}: {row.problem}"] if row.problem else []
    for failure in failures:
        print(f"\nFAILED {failure}")
    print(f"\n{len(failures)} failures in {len(cases)} cases; {time.perf_counter() - started:.0f} s")
    return int(bool(failures))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SIZES, default="1b", help="of the model for machines with GPUs")
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--goals", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    return parser.parse_args()


def make_cases(folder: Path, args: argparse.Namespace) -> Iterator[Case]:
    """Write what every case needs: one or two models with tokenizer, and the text."""
    data = folder / "text.jsonl"
    alphabet = bytes(range(97, 123)).decode()
    row = (alphabet * (ROW_BYTES // len(alphabet) + 1))[:ROW_BYTES]
    data.write_text("".join(json.dumps({"text": row[i:] + row[:i]}) + "\n" for i in range(ROWS)), encoding="utf-8")
    for machine in args.machines:
        shape = args.shape if MACHINES[machine][0] else "tiny"
        model = folder / shape
        if not model.exists():
            write_checkpoint(model, shape)
            make_tokenizer().save_pretrained(model)
        for goal in args.goals:
            own = folder / f"{machine}-{goal}"
            own.mkdir()
            yield Case(machine, goal, own, model, data)


def ask_wizard(case: Case) -> Ended:
    """`hf-fsdp-qlora config`, as someone at that machine would call it. The cores are this machine's."""
    gpus, card, host = MACHINES[case.machine]
    accelerate, recipe = case.files
    command = [
        *CLI, "config", "--yes", "--model", str(case.model), "--dataset", str(case.data), "--goal", case.goal,
        "--gpus", str(gpus), "--host-memory", f"{host}GiB", "--cores", str(cores()),
        "--accelerate-config", accelerate, "--recipe", recipe,
    ]  # fmt: skip
    return run_command([*command, *(["--gpu-memory", f"{card}GiB"] if gpus else [])], case.folder, {}, RUN_LIMIT_S)


def look(case: Case, wizard: Ended) -> tuple[Row, Ended]:
    """Validate what the wizard wrote. In one thread only: the command line's output goes through `sys.stdout`."""
    if wizard.status != 0:
        return Row(case, validates="NO FILES", problem=f"the wizard: {wizard.text[-2000:]}"), wizard
    planned = planned_gib(wizard)
    chosen = describe_choice(*case.files) + f", plans {planned} GiB a card" * bool(planned)
    problem = validate(case)
    return Row(case, chosen, "NO" if problem else "yes", problem=problem), wizard


def finish(row: Row, wizard: Ended, conditions: Conditions) -> Row:
    """Train, if the files are good and this machine is large enough."""
    if wizard.status != 0:
        return row
    obstacle = "it does not validate" if row.problem else why_not_here(row.case, wizard)
    if obstacle:
        return replace(row, trained=f"not run: {obstacle}")
    with conditions.cards.take(MACHINES[row.case.machine][0], planned_gib(wizard)) as gpus:
        trained, problem = train(row.case, wizard, gpus, conditions)
    return replace(row, trained=trained, problem=problem)


def describe_choice(accelerate_file: str, recipe_file: str) -> str:
    """Engine, offload, batch and compiled layers of the files."""
    accelerate, recipe = (yaml.safe_load(Path(name).read_text()) for name in (accelerate_file, recipe_file))
    fsdp = accelerate.get("fsdp_config")
    alone = accelerate["distributed_type"] == "NO"
    engine = f"FSDP{fsdp['fsdp_version']}" if fsdp else "one process" if alone else "DDP"
    everything = fsdp is not None and fsdp["fsdp_offload_params"]
    offload = "all" if everything else recipe.get("offload", "none")
    batch, steps = recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
    compiled = f", compiled, budget {recipe['activation_budget']}" if recipe.get("compile_layers") else ""
    return f"{engine}, offload {offload}, batch {batch} x {steps} steps, {recipe['max_length']} tokens{compiled}"


def validate(case: Case) -> str | None:
    """`hf-fsdp-qlora validate` in this process; what it said if it found something."""
    gpus, card, _ = MACHINES[case.machine]
    accelerate, recipe = case.files
    command = ["validate", "--accelerate_config", accelerate, "--config", recipe]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        status = cli.main([*command, *(["--gpu-memory", f"{card}GiB"] if gpus else [])])
    return f"validate: {said.getvalue()}" if status else None


def why_not_here(case: Case, wizard: Ended) -> str | None:
    """What this machine lacks to be that one."""
    gpus, card, _ = MACHINES[case.machine]
    here = torch.cuda.device_count()
    if gpus > here:
        return f"{gpus} GPUs, here {here}"
    if gpus and planned_gib(wizard) > card_bytes() / GIB:
        return f"plans {planned_gib(wizard)} of {card} GiB, here {card_bytes() / GIB:.0f}"
    return None


def planned_gib(wizard: Ended) -> float:
    """What the wizard said a card would need; 0 for a machine without cards."""
    return float((re.findall(r"fits: ([\d.]+) of ", wizard.text) or ["0"])[-1])


def train(case: Case, wizard: Ended, gpus: Sequence[str], conditions: Conditions) -> tuple[str, str | None]:
    """Run the command that the wizard printed on these GPUs. Returns the cell of the table, and what failed."""
    card = MACHINES[case.machine][1]
    words = shlex.split(wizard.text.strip().splitlines()[-1])
    start = words.index("hf-fsdp-qlora")
    output = case.folder / "output"
    command = [*CLI, *words[start + 1 :], "--max_steps", str(STEPS), "--logging_steps", "1", "--output_dir",
               str(output)]  # fmt: skip
    env = conditions.env | dict(word.split("=", 1) for word in words[:start])
    env |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus), **(cap(card) if conditions.capped and gpus else {})}
    ended = run_command(command, case.folder, env, conditions.limit_s)
    if ended.status != 0:
        how = f"status {ended.status}" if ended.status is not None else f"no end within {conditions.limit_s:.0f} s"
        return f"FAILED: {how}", f"train, {how}:\n{ended.text[-4000:]}"
    log: list[dict[str, Any]] = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses, norms = ([entry[key] for entry in log if key in entry] for key in ("loss", "grad_norm"))
    sound = all(map(math.isfinite, losses)) and all(math.isfinite(norm) and norm > 0 for norm in norms)
    if not (len(losses) == len(norms) == STEPS and sound):
        got = f"losses {losses}, gradient norms {norms}"
        return f"FAILED: {got}", f"train: {STEPS} finite losses and gradients are needed, got {got}"
    peaks = [entry[key] for entry in log for key in entry if key.startswith("memory/gpu_peak_gib")]
    peak = f", peak {max(peaks):.1f} GiB" if peaks else ""
    return f"loss {losses[-1]:.3f}{peak}, {ended.seconds:.0f} s", None


if __name__ == "__main__":
    raise SystemExit(main())
