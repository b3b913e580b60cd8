"""How wizard_check.py runs commands: with a limit of time, on GPUs that several runs may share, in caps of memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
RUN_LIMIT_S = 120.0
SHARED_LIMIT_S = 240.0
CONTEXT_GIB = 2.0  # what a process holds of a card beside its tensors: CUDA context, NCCL, and some doubt
GIB = 2**30


@dataclass(frozen=True)
class Ended:
    """A command that ran: its exit status (None: it ran past the limit), what it said, and for how long."""

    status: int | None
    text: str
    seconds: float


class Cards:
    """The GPUs here, and the memory of each that no run has been promised."""

    def __init__(self) -> None:
        self._free_gib = dict.fromkeys(visible_gpus(), card_bytes() / GIB if visible_gpus() else 0.0)
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, count: int, planned_gib: float) -> Iterator[list[str]]:
        """Wait until `count` GPUs have room for a plan and the context, or are empty, and hold them while inside.

        Yields:
            Their names for CUDA_VISIBLE_DEVICES, those with the most memory left.
        """
        gib = min(planned_gib + CONTEXT_GIB, card_bytes() / GIB) if count else 0.0
        with self._changed:
            self._changed.wait_for(lambda: len(self._with_room(gib)) >= count)
            taken = self._with_room(gib)[:count]
            self._give(taken, -gib)
        try:
            yield taken
        finally:
            with self._changed:
                self._give(taken, gib)
                self._changed.notify_all()

    def _with_room(self, gib: float) -> list[str]:
        names = sorted(self._free_gib, key=self._free_gib.__getitem__, reverse=True)
        return [name for name in names if self._free_gib[name] >= gib - 1e-6]

    def _give(self, names: Sequence[str], gib: float) -> None:
        for name in names:
            self._free_gib[name] += gib


@dataclass(frozen=True)
class Conditions:
    """What runs have: whether torch caps cards, who shares them, and how many runs there are at a time."""

    capped: bool
    cards: Cards
    jobs: int

    @property
    def limit_s(self) -> float:
        """Of a training."""
        return SHARED_LIMIT_S if self.jobs > 1 else RUN_LIMIT_S

    @property
    def env(self) -> dict[str, str]:
        """Cores for one of several runs; one alone has what it takes."""
        return {"OMP_NUM_THREADS": str(max(1, cores() // self.jobs))} if self.jobs > 1 else {}


def run_command(command: Sequence[str], folder: Path, env: dict[str, str], limit_s: float) -> Ended:
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
            status = process.wait(timeout=limit_s)
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


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
