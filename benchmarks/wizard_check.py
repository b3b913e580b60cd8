"""What the wizard writes for six machines and every goal: does it validate, and does it train as it is?

    PYTHONPATH=. python benchmarks/wizard_check.py                          (on a machine with GPUs)
    PYTHONPATH=. python benchmarks/wizard_check.py --shape tiny --goals qlora   (without)

For each machine and goal `hf-fsdp-qlora config --yes` gets the machine's figures as flags; its two files go through
`hf-fsdp-qlora validate`. Where this machine has as many GPUs as the profile, and they are large enough for what the
wizard planned, the command that the wizard printed is then run, with three steps, a log line per step and a temporary
output folder over the recipe. The processes see only as many GPUs as the profile has, and torch's allocator gives each
no more than the profile's memory of a card (PYTORCH_ALLOC_CONF). A probe says whether this torch does so ("cards
capped"); if not, runs have the whole card, and only the printed peak tells whether the plan was right.
The CUDA context is outside that count, and so are the link speeds and host memory of the real machine.

Weights are random, in the shape of Llama-3.2-1B with a head of its own; the profile without GPUs has a tiny model. The
text is the alphabet, a byte a token, in rows of full length. "Trained" means: the command ended with status 0, and its
log has three finite losses and norms of gradients that are finite and not zero; the size of a loss means nothing. A
run has RUN_LIMIT_S seconds. Exit status 1 if a wizard, a validation or a training failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from launch import describe_machine
from planner_models import SIZES, write_checkpoint

from hf_fsdp_qlora import cli
from hf_fsdp_qlora.goals import GOALS
from tests.tiny_tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MACHINES: dict[str, tuple[int, int, int]] = {  # GPUs, GiB of a card, GiB of the host
    "1x24": (1, 24, 64), "2x24": (2, 24, 128), "4x16": (4, 16, 128), "8x80": (8, 80, 1024), "cpu": (0, 0, 32),
    "1x141": (1, 141, 256),
}  # fmt: skip
CLI = (sys.executable, "-m", "hf_fsdp_qlora.cli")
STEPS = 3
ROWS = 64
ROW_BYTES = 4096
RUN_LIMIT_S = 120.0
GIB = 2**30


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
class Ended:
    """A command that ran: its exit status (None: it ran past the limit), what it said, and for how long."""

    status: int | None
    text: str
    seconds: float


def main() -> int:
    args = parse_arguments()
    print(describe_machine(), flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        cases = list(make_cases(Path(name), args))
        capped = torch.cuda.is_available() and cap_holds()
        print(f"models and data: {time.perf_counter() - started:.0f} s; cards capped: {capped}", flush=True)
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
            written = list(pool.map(ask_wizard, cases))
        print(f"{len(cases)} wizards: {time.perf_counter() - started:.0f} s\n", flush=True)
        print("| machine | goal | chosen | validates | trained |\n| --- | --- | --- | --- | --- |", flush=True)
        failures = [
            failure for case, wizard in zip(cases, written, strict=True) for failure in look(case, wizard, capped)
        ]
    for failure in failures:
        print(f"\nFAILED {failure}")
    print(f"\n{len(failures)} failures in {len(cases)} cases; {time.perf_counter() - started:.0f} s")
    return int(bool(failures))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SIZES, default="1b", help="of the model for machines with GPUs")
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--goals", nargs="+", choices=GOALS, default=list(GOALS))
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
        "--gpus", str(gpus), "--host-memory", f"{host}GiB", "--cores", str(len(os.sched_getaffinity(0))),
        "--accelerate-config", accelerate, "--recipe", recipe,
    ]  # fmt: skip
    return run_command([*command, *(["--gpu-memory", f"{card}GiB"] if gpus else [])], case.folder, {})


def look(case: Case, wizard: Ended, capped: bool) -> Iterator[str]:
    """Validate, train, and print the row of the table. Yields what failed."""
    chosen, validates, trained = "", "", ""
    problem = None
    if wizard.status != 0:
        validates, problem = "NO FILES", f"the wizard: {wizard.text[-2000:]}"
    else:
        chosen = describe_choice(*case.files) + f", plans {planned_gib(wizard)} GiB a card" * bool(planned_gib(wizard))
        problem = validate(case)
        validates = "NO" if problem else "yes"
        obstacle = "it does not validate" if problem else why_not_here(case, wizard)
        if obstacle:
            trained = f"not run: {obstacle}"
        else:
            trained, problem = train(case, wizard, capped)
    print(f"| {case.machine} | {case.goal} | {chosen} | {validates} | {trained} |", flush=True)
    if problem:
        yield f"{case.machine}, {case.goal}: {problem}"


def describe_choice(accelerate_file: str, recipe_file: str) -> str:
    """Engine, offload and batch of the files."""
    accelerate, recipe = (yaml.safe_load(Path(name).read_text()) for name in (accelerate_file, recipe_file))
    fsdp = accelerate.get("fsdp_config")
    alone = accelerate["distributed_type"] == "NO"
    engine = f"FSDP{fsdp['fsdp_version']}" if fsdp else "one process" if alone else "DDP"
    everything = fsdp is not None and fsdp["fsdp_offload_params"]
    offload = "all" if everything else recipe.get("offload", "none")
    batch, steps = recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
    return f"{engine}, offload {offload}, batch {batch} x {steps} steps, {recipe['max_length']} tokens"


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


def train(case: Case, wizard: Ended, capped: bool) -> tuple[str, str | None]:
    """Run the command that the wizard printed. Returns the cell of the table, and what failed."""
    gpus, card, _ = MACHINES[case.machine]
    words = shlex.split(wizard.text.strip().splitlines()[-1])
    start = words.index("hf-fsdp-qlora")
    output = case.folder / "output"
    command = [*CLI, *words[start + 1 :], "--max_steps", str(STEPS), "--logging_steps", "1", "--output_dir",
               str(output)]  # fmt: skip
    env = dict(word.split("=", 1) for word in words[:start])
    env["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[:gpus])
    ended = run_command(command, case.folder, {**env, **(cap(card) if capped and gpus else {})})
    if ended.status != 0:
        how = f"status {ended.status}" if ended.status is not None else f"no end within {RUN_LIMIT_S:.0f} s"
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


def run_command(command: Sequence[str], folder: Path, env: dict[str, str]) -> Ended:
    """Run it with a limit of time, and end its descendants with it: launchers start ranks in sessions of their own."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    told = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    started = time.perf_counter()
    log = folder / "log.txt"
    with log.open("w") as said:  # a pipe would stay open in what outlives the command
        process = psutil.Popen(
            command, cwd=folder, env={**os.environ, **told, **env}, stdin=subprocess.DEVNULL, stdout=said,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = process.wait(timeout=RUN_LIMIT_S)
        except psutil.TimeoutExpired:
            status = None
            family = [*process.children(recursive=True), process]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=10)
    return Ended(status, log.read_text(errors="replace"), time.perf_counter() - started)


def cap_holds() -> bool:
    """Whether torch takes a limit of memory from the environment: a process asks for half a card and looks."""
    half = cap(card_bytes() / GIB / 2)
    code = "import torch; torch.empty(1, device='cuda'); print(torch.cuda.get_per_process_memory_fraction())"
    probe = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **half}, capture_output=True, text=True, timeout=60
    )
    return probe.returncode == 0 and abs(float(probe.stdout) - 0.5) < 0.01


def cap(gib: float) -> dict[str, str]:
    """The environment in which torch's allocator gives a process so much of a card, at most all of it."""
    return {"PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{min(1.0, gib * GIB / card_bytes()):.4f}"}


def card_bytes() -> int:
    """Memory of the smallest card here."""
    return min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]


if __name__ == "__main__":
    raise SystemExit(main())
