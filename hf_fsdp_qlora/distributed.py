"""What every layer needs to know about the other ranks, and the rule that they fail together.

A collective that one rank never enters is a hang that ends in a time-out naming the wrong line. So work that can
fail on one rank alone (a file that is missing on one node, a full disk) runs inside `same_outcome()`, which lets the
ranks compare notes before anybody goes on. With no process group all of this is free.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from hf_fsdp_qlora.errors import ConfigError

SETTLE_S = 0.1
"""Seconds. A thread that has work left needs microseconds and a turn on a core."""


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if _is_initialized() else 1


def local_rank() -> int:
    """This process's rank on its node, as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def on_any_rank(fact: bool) -> bool:
    """Whether the fact is true on some rank. Collective."""
    facts: list[bool] = [fact] * world_size()
    if world_size() > 1:
        dist.all_gather_object(facts, fact)
    return any(facts)


def check_same(what: str, value: str | None) -> None:
    """Compare what each rank found for itself, such as on a disk that only its node sees. Collective.

    Args:
        what: what the value is, as a noun phrase for the message.

    Raises:
        ConfigError: on every rank, if two of them differ.
    """
    values: list[str | None] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    other = next((index for index, each in enumerate(values) if each != values[0]), None)
    if other is not None:
        raise ConfigError(
            f"{what} is {values[0]} for rank 0 and {values[other]} for rank {other}. Give all nodes the same files: a "
            "folder that they share, or a copy of it on each."
        )


@contextmanager
def patient_ranks(timeout_s: float) -> Iterator[dist.ProcessGroup | None]:
    """A process group of all ranks that waits this long, for work that takes longer than the default one allows.

    Accelerate opens the default group with 10 minutes for NCCL and 30 for gloo (`ddp_timeout` of the training
    arguments, if they are built first). None without a process group.
    """
    if world_size() == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def settle_at_exit() -> None:
    """Give gloo's threads a moment before the interpreter goes, when the program ends.

    They let go of a collective's tensors after the collective has returned, and need the GIL for it. If the
    interpreter is being finalised by then, torch (2.13) ends a program that has done all its work with SIGABRT,
    "terminate called without an active exception". Destroying the group does not wait for them: DTensor's caches keep
    it alive. Left out: collectives in functions that were registered with atexit before this one, which run after it.
    Source: github.com/pytorch/pytorch/issues/190489.
    """
    if _is_initialized():
        atexit.unregister(_settle)
        atexit.register(_settle)


@contextmanager
def same_outcome(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block on every rank and leave it the same way on every rank.

    Args:
        what: the work, as a noun phrase for the message other ranks get ("reading the checkpoint").
        group: of all ranks, in which to compare; None is the default group.

    Raises:
        Exception: the block's own error on the ranks where it failed; a RuntimeError that quotes it on the others.

    The block must not contain collectives: a rank that failed would not take part in them.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if world_size() > 1:
        reports: list[str | None] = [None] * world_size()
        dist.all_gather_object(reports, None if error is None else f"{type(error).__name__}: {error}", group)
        failed = [(index, report) for index, report in enumerate(reports) if report is not None]
        if failed and error is None:
            index, report = failed[0]
            raise RuntimeError(f"{what} failed on rank {index}: {report}")
    if error is not None:
        raise error


def _settle() -> None:
    time.sleep(SETTLE_S)


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
