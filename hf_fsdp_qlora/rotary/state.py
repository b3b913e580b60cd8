"""The state of a rotary run in a checkpoint: masters, optimizer states and where the rotation stands.

    checkpoint-100/rotary/rank-00000-of-00002.safetensors   slices of what was trained, and their optimizer states
    checkpoint-100/rotary/rank-00001-of-00002.safetensors
    checkpoint-100/rotary/state.json                        the rotation, and which files belong to it

Each rank writes its own slices, streamed, so saving needs neither communication nor memory. With them goes what
active blocks were before their visit: the norm of what it changes is measured against that. Parameters that were
never trained are not in it: their masters are the model's own checkpoint, which must still be there. Every file is
complete under its name or absent (written beside, fsync, rename), and `state.json` is removed first and written last:
a folder that has it has all of it.

On the same number of ranks everything comes back as it was, bit for bit. On another number masters and 32-bit moments
are divided anew, exactly; so are the states of 8-bit optimizers, whose blocks no slice cuts. Kept moments that were
compressed are expanded, and compressed again at the next parking.

Left out: folders that ranks do not share.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_fsdp_qlora.distributed import same_outcome
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.rotary.masters import Masters, slice_bounds
from hf_fsdp_qlora.rotary.moments import Parts, expand_state, merge_states, split_state
from hf_fsdp_qlora.safetensors_stream import SafetensorsWriter, TensorInfo

logger = logging.getLogger(__name__)

_FOLDER, _STATE = "rotary", "state.json"
_MASTER, _START, _MOMENT = "master", "start", "moment"
_VALUES = "values"
"""Metadata key of what is no tensor in the optimizer states, as JSON."""

OptimizerState = dict[str, Any]


def save_state(
    checkpoint: Path, masters: Masters, moments: Mapping[str, OptimizerState], rotation: Mapping[str, Any]
) -> None:
    """Write the state of this moment. Collective; every rank writes its part.

    Args:
        checkpoint: the trainer's folder, created if needed.
        masters: up to date, those of active blocks too.
        moments: optimizer states of this rank's slices by parameter: tensors, `Parts` and JSON values.
        rotation: for JSON, the same on every rank.

    Raises:
        OSError: writing failed; a RuntimeError that quotes it on the other ranks.
    """
    folder = checkpoint / _FOLDER
    with same_outcome(f"preparing {folder}"):
        if masters.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _STATE).unlink(missing_ok=True)
            for unfinished in folder.glob("*.tmp"):
                unfinished.unlink()
    with same_outcome(f"saving the masters to {folder}"):
        tensors, values = _flatten(masters, moments)
        infos = {key: _info(tensor) for key, tensor in tensors.items()}

        def write(path: Path) -> None:
            with SafetensorsWriter(path, infos, {_VALUES: json.dumps(values)}) as writer:
                for tensor in tensors.values():
                    for part in tensor.tensors if isinstance(tensor, Parts) else (tensor,):
                        writer.append(part)

        _put_in_place(folder / _file_name(masters.rank, masters.world_size), write)
    with same_outcome(f"finishing {folder}"):
        if masters.rank == 0:
            _finish(folder, masters, rotation)


def load_state(checkpoint: Path, masters: Masters) -> tuple[dict[str, OptimizerState], dict[str, Any]]:
    """Replace all masters by those of a checkpoint. Collective; every rank reads its part.

    Args:
        checkpoint: what was passed to `save_state`, by any number of ranks.
        masters: of the same model.

    Returns:
        What `save_state` was given as `moments` (tensors on the host, tuples as lists) and as `rotation`. On another
        number of ranks, moments of this rank's slices.

    Raises:
        ConfigError: the folder holds no complete state, or that of another model or master dtype. On the ranks that
            see it; a RuntimeError that quotes it on the others.
    """
    folder = checkpoint / _FOLDER
    with same_outcome(f"reading the masters from {folder}"):
        state = _read_description(folder, masters)
        masters.forget()
        if state["world_size"] == masters.world_size:
            return _read_own(folder, masters), state["rotation"]
        return _read_divided(folder, masters, state["world_size"]), state["rotation"]


def _flatten(
    masters: Masters, moments: Mapping[str, OptimizerState]
) -> tuple[dict[str, Tensor | Parts], dict[str, dict[str, Any]]]:
    """Tensors by their names in the file, wide items first so that all are aligned, and the rest by parameter."""
    tensors: dict[str, Tensor | Parts] = {f"{_MASTER}/{name}": tensor for name, tensor in masters.trained()}
    tensors |= {f"{_START}/{name}": tensor for name, tensor in masters.starts()}
    values: dict[str, dict[str, Any]] = {}
    for name, state in moments.items():
        values[name] = {}
        for key, value in state.items():
            if isinstance(value, (Tensor, Parts)):
                tensors[f"{_MOMENT}/{name}/{key}"] = value
            else:
                values[name][key] = value
    return dict(sorted(tensors.items(), key=lambda entry: -entry[1].dtype.itemsize)), values


def _info(tensor: Tensor | Parts) -> TensorInfo:
    return TensorInfo(tensor.dtype, (tensor.numel,) if isinstance(tensor, Parts) else tuple(tensor.shape))


def _finish(folder: Path, masters: Masters, rotation: Mapping[str, Any]) -> None:
    """Remove files of a save by another number of ranks, and say that this one is complete."""
    files = {_file_name(rank, masters.world_size) for rank in range(masters.world_size)}
    for path in folder.glob("rank-*.safetensors"):
        if path.name not in files:
            path.unlink()
    description = {
        "world_size": masters.world_size, "master_dtype": str(masters.dtype),
        "numels": {name: stored.numel for name, stored in masters.stored.items()}, "rotation": rotation,
    }  # fmt: skip

    def write(path: Path) -> None:
        with open(path, "w") as file:
            json.dump(description, file)
            file.flush()
            os.fsync(file.fileno())

    _put_in_place(folder / _STATE, write)


def _put_in_place(path: Path, write: Callable[[Path], None]) -> None:
    """Make a file in one step: it is whole or not there, whenever the machine stops."""
    unfinished = path.with_name(path.name + ".tmp")
    write(unfinished)
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_description(folder: Path, masters: Masters) -> dict[str, Any]:
    if not (folder / _STATE).is_file():
        raise ConfigError(
            f"There is no {folder / _STATE}: the checkpoint is not one of rotary training, or saving it was cut "
            "short. Resume an earlier one."
        )
    state: dict[str, Any] = json.loads((folder / _STATE).read_text())
    numels = {name: stored.numel for name, stored in masters.stored.items()}
    if state["numels"] != numels:
        differing = sorted(
            name for name in state["numels"].keys() | numels if state["numels"].get(name) != numels.get(name)
        )
        raise ConfigError(f"{folder} is of another model: {differing[0]} and {len(differing) - 1} more differ.")
    if state["master_dtype"] != str(masters.dtype):
        raise ConfigError(
            f"{folder} has {state['master_dtype']} masters, this run {masters.dtype}. Set RotaryConfig's master_dtype "
            "to what the checkpoint has."
        )
    return state


def _read_own(folder: Path, masters: Masters) -> dict[str, OptimizerState]:
    with safe_open(folder / _file_name(masters.rank, masters.world_size), "pt") as file:
        for key in file.keys():  # noqa: SIM118  (no mapping)
            kind, name = key.split("/", 2)[:2]
            if kind == _MASTER:
                masters.store(name, file.get_tensor(key))
            elif kind == _START:
                masters.set_start(name, file.get_tensor(key))
        return {name: _read_moments(file, name) for name in json.loads(file.metadata()[_VALUES])}


def _read_divided(folder: Path, masters: Masters, old_ranks: int) -> dict[str, OptimizerState]:
    """This rank's part of what other ranks saved."""
    moments: dict[str, OptimizerState] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / _file_name(r, old_ranks), "pt")) for r in range(old_ranks)]
        keys = set(files[0].keys())
        for name in masters.stored:
            if f"{_MASTER}/{name}" in keys:
                masters.store(name, _read_divided_values(files, masters, name, _MASTER))
            if f"{_START}/{name}" in keys:
                masters.set_start(name, _read_divided_values(files, masters, name, _START))
        for name in json.loads(files[0].metadata()[_VALUES]):
            state = _divide_moments(files, masters, name)
            if state:
                moments[name] = state
    return moments


def _read_divided_values(files: list[Any], masters: Masters, name: str, kind: str) -> Tensor:
    """(slice length,) this rank's slice of what is in the files by that name."""
    numel = masters.stored[name].numel
    first, last = masters.slice_bounds(name)
    parts = []
    for rank, file in enumerate(files):
        start, stop = slice_bounds(numel, rank, len(files))
        low, high = max(start, first), min(stop, last)
        if low < high:
            parts.append(file.get_slice(f"{kind}/{name}")[low - start : high - start])
    return torch.cat(parts) if parts else torch.empty(0, dtype=masters.dtype)


def _divide_moments(files: list[Any], masters: Masters, name: str) -> OptimizerState:
    """The optimizer state of this rank's slice; empty if it has no elements, or if the states do not fit together."""
    numel = masters.stored[name].numel
    old = [bounds for rank in range(len(files)) if (bounds := slice_bounds(numel, rank, len(files)))[0] < bounds[1]]
    states = [expand_state(_read_moments(file, name)) for file, _ in zip(files, old, strict=False)]
    if len({_form(state) for state in states}) > 1:
        logger.warning(
            "The optimizer state of %s cannot be divided among %d ranks: parts of it are in 32 bit and others in 8 "
            "(bitsandbytes keeps short slices in 32). It starts from zero.", name, masters.world_size,
        )  # fmt: skip
        return {}
    new = [slice_bounds(numel, rank, masters.world_size) for rank in range(masters.world_size)]
    sizes = [last - first for first, last in new if first < last]
    if masters.rank >= len(sizes):
        return {}
    return split_state(merge_states(states, [last - first for first, last in old]), sizes)[masters.rank]


def _form(state: OptimizerState) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, str(value.dtype) if isinstance(value, Tensor) else "") for key, value in state.items()))


def _read_moments(file: Any, name: str) -> OptimizerState:
    prefix = f"{_MOMENT}/{name}/"
    tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    return {**json.loads(file.metadata()[_VALUES])[name], **tensors}


def _file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
