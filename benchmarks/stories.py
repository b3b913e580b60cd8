"""Many short stories in few processes: ranks are started once per engine, and a story that fails costs only itself.

Starting ranks takes longer than what they do with a tiny model. So each group of stories runs in one set of ranks, one
after another. Between them accelerate forgets what it learnt from the environment, as it would in a fresh process
(`TrainingArguments` relies on the same reset). A rank that raises ends its set, as no collective would finish without
it; that story is noted as failed, and a new set of ranks goes on behind it.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from launch import run_ranks
from torch.multiprocessing.spawn import ProcessException

COLLECTIVE_TIMEOUT = timedelta(seconds=90)
GROUPS_AT_ONCE = 8
"""On a machine with a GPU, which has the cores; on a CPU the groups run one after another."""


@dataclass(frozen=True)
class Story:
    """One call on every rank.

    Args:
        function: a module-level function; what it returns must be picklable.
        args: its arguments.
        env: environment variables for this story, on top of those of the group.
        show: a module-level function that puts rank 0's result into words; they are printed when it is there.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    show: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Group:
    """Stories by name, and the ranks that tell them. `env` is what the launcher would set."""

    stories: Mapping[str, Story]
    world_size: int
    env: Mapping[str, str] = field(default_factory=dict)
    process_group: bool = True


@dataclass(frozen=True)
class Failure:
    """Stands where a story has no results: the end of the first failing rank's traceback."""

    reason: str


QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
"""Read when Python and the libraries start. What a hundred tiny runs say would bury the table."""

Outcome = list[Any] | Failure
"""What a story returned, by rank."""


def tell_all(groups: Mapping[str, Group]) -> dict[tuple[str, str], Outcome]:
    """Run every group; beside a GPU all at the same time.

    Returns:
        By (group, story).
    """
    os.environ.update(QUIET)
    with ThreadPoolExecutor(GROUPS_AT_ONCE if torch.cuda.is_available() else 1) as pool:
        told = {name: pool.submit(_tell_group, name, group) for name, group in groups.items()}
        return {(name, story): outcome for name in groups for story, outcome in told[name].result().items()}


def _tell_group(group_name: str, group: Group) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    while left := {name: story for name, story in group.stories.items() if name not in outcomes}:
        with tempfile.TemporaryDirectory() as folder:
            reason = None
            try:
                run_ranks(
                    _tell, folder, group_name, left, world_size=group.world_size, env=dict(group.env),
                    process_group=group.process_group, collective_timeout=COLLECTIVE_TIMEOUT,
                )  # fmt: skip
            except ProcessException as error:
                reason = str(error).strip()
            for index, name in enumerate(left):
                files = [_result(folder, index, rank) for rank in range(group.world_size)]
                if all(file.exists() for file in files):
                    outcomes[name] = [pickle.loads(file.read_bytes()) for file in files]
                elif reason is not None:
                    outcomes[name] = Failure(reason)
                    print(f"{group_name}: {name} failed:\n{reason}\n", file=sys.stderr, flush=True)
                    break
    return outcomes


def _tell(folder: str, group_name: str, stories: Mapping[str, Story]) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    launched = dict(os.environ)
    for index, (name, story) in enumerate(stories.items()):
        started = time.perf_counter()
        os.environ.clear()
        os.environ.update(launched, **story.env)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # logs and progress bars
            told = story.function(*story.args)
        result = pickle.dumps(told)
        partial = _result(folder, index, rank).with_suffix(".partial")
        partial.write_bytes(result)
        partial.rename(_result(folder, index, rank))
        gc.collect()  # models and trainers are cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if rank == 0:
            seconds = time.perf_counter() - started
            print(f"{group_name}: {name}: {seconds:.1f} s", file=sys.stderr, flush=True)
            if story.show is not None:
                print(story.show(told), flush=True)
        del told


def _result(folder: str, index: int, rank: int) -> Path:
    return Path(folder) / f"{index}-{rank}.pickle"
