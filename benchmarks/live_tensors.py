"""Which large tensors are alive in this process and what holds them, for a rank that holds more than the others."""

from __future__ import annotations

import gc
from types import FrameType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

LEVELS = 4
"""Of referrers: what a closure holds may be in a dict, in a cell, in the tuple of a function."""
AT_MOST = 3
"""Referrers of one object that are named."""
ENDS = (nn.Module, Tensor, FunctionType)
"""What says enough by its name: the way up ends there."""


def live_tensors(device_type: str, *, least_bytes: int = 64 * 2**20) -> list[str]:
    """A line for each storage of at least so many bytes that Python refers to, the largest first; then their sum.

    What waits in a reference cycle is found: nothing is collected, and nothing is kept. What only C++ holds (saved for
    backward) is not found, so the sum is to be compared with what is allocated.
    """
    found: dict[int, list[Tensor]] = {}
    for thing in gc.get_objects():
        kind = type(thing)  # isinstance would look at the class that some lazy objects pretend to be, and import it
        if not issubclass(kind, Tensor) or issubclass(kind, DTensor) or thing.device.type != device_type:
            continue
        if thing.untyped_storage().nbytes() >= least_bytes:
            found.setdefault(thing.untyped_storage().data_ptr(), []).append(thing)
    groups = sorted(found.values(), key=lambda group: -_mib(group[0]))
    holders = _holders([tensor for group in groups for tensor in group], ours=[*groups])
    lines = []
    for group in groups:
        shown = [f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype} < {_up(tensor, holders)}"
                 for tensor in group]  # fmt: skip
        lines.append(f"{_mib(group[0]):.1f} MiB: {'; '.join(shown)}")
    return [*lines, f"{sum(_mib(group[0]) for group in groups):.1f} MiB in {len(groups)} storages"]


def _mib(tensor: Tensor) -> float:
    return tensor.untyped_storage().nbytes() / 2**20


def _holders(targets: list[Any], ours: list[Any]) -> dict[int, list[Any]]:
    """By id of an object what refers to it, for the targets and `LEVELS` up; one pass over all objects a level."""
    holders: dict[int, list[Any]] = {}
    for _ in range(LEVELS):
        wanted = {id(target): target for target in targets}
        skipped = {id(own) for own in (*ours, ours, targets, wanted, *holders.values())}
        targets = []
        for referrer in gc.get_referrers(*wanted.values()):
            if id(referrer) in skipped or isinstance(referrer, FrameType):
                continue
            for target in gc.get_referents(referrer):
                if id(target) in wanted:
                    holders.setdefault(id(target), []).append(referrer)
            if id(referrer) not in holders and not isinstance(referrer, ENDS):
                targets.append(referrer)
        if not targets:
            break
    return holders


def _up(thing: Any, holders: dict[int, list[Any]], levels: int = LEVELS) -> str:
    """The names of what refers to an object, and after each "<" of what refers to that."""
    ways = []
    for holder in holders.get(id(thing), [])[:AT_MOST] if levels else []:
        further = "" if isinstance(holder, ENDS) else _up(holder, holders, levels - 1)
        ways.append(f"{_name(holder)} < {further}" if further else _name(holder))
    return f"({' | '.join(ways)})" if len(ways) > 1 else "".join(ways)


def _name(thing: Any) -> str:
    if isinstance(thing, dict):
        return f"dict{[str(key)[:30] for key in list(thing)[:2]]}"
    return thing.__qualname__ if isinstance(thing, FunctionType) else type(thing).__name__
