"""Optimizer states of parameters that are parked, on the host, in 32 or 8 bit.

A state is what the inner optimizer keeps for a flat slice: vectors as long as the slice (Adam's moments), for 8-bit
optimizers their codes and a vector of block scales, and what all pieces of a slice share (step counters, code books).
The optimizer may cut a slice in pieces, and a slice can be an embedding's: its moments are never joined on the device.
What was cut is handed on as `Parts`, and whoever writes it, to the host or to a file, takes one after the other.

In 8 bit, a float32 vector is stored in bitsandbytes' blockwise dynamic type, one without negative values as its square
root, so that Adam's second moments keep the range of the first. What rounds to zero there becomes the smallest value
that its block can hold: dividing by the root of a lost second moment would be a step of any size. States of 8-bit
optimizers are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fsdp_qlora.quantization import DynamicInt8Config, backend_for_config
from hf_fsdp_qlora.quantization.bitsandbytes import dynamic_map

OPTIMIZER_BLOCK = 256
"""Weights under one scale in bitsandbytes' 8-bit optimizers."""
_BLOCK = 128
"""Weights under one scale in kept moments."""
COMPRESS_ELEMENTS = 2**24
"""Moments that are compressed at once: bounds the temporary memory. A multiple of the 8-bit format's rows."""
_CODES, _SCALES, _ROOT = "/codes", "/scales", "/root"


@dataclass(frozen=True)
class Parts:
    """A vector that is in several tensors.

    Args:
        tensors: one or more, each (n,), of one dtype and device, in order.
    """

    tensors: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        return self.tensors[0].dtype

    @property
    def numel(self) -> int:
        """Elements of the vector."""
        return sum(part.numel() for part in self.tensors)

    def joined(self, device: torch.device | str) -> Tensor:
        """(numel,) a copy of the vector in one tensor."""
        whole = torch.empty(self.numel, dtype=self.dtype, device=device)
        for room, part in zip(whole.split([part.numel() for part in self.tensors]), self.tensors, strict=True):
            room.copy_(part)
        return whole

    def runs(self, size: int) -> Iterator[Tensor]:
        """The vector, `size` elements at a time (the last run may be shorter), wherever the tensors end."""
        run: list[Tensor] = []
        missing = size
        for part in self.tensors:
            while part.numel():
                taken, part = part[:missing], part[missing:]
                run.append(taken)
                missing -= taken.numel()
                if not missing:
                    yield torch.cat(run) if len(run) > 1 else run[0]
                    run, missing = [], size
        if run:
            yield torch.cat(run) if len(run) > 1 else run[0]


class Moments:
    """Host store of optimizer states by parameter name.

    Args:
        bits: 32 keeps vectors as they are, 8 compresses those in float32.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.kept: dict[str, dict[str, Any]] = {}

    def put(self, name: str, state: dict[str, Any]) -> None:
        """Copy a state to the host, compressed if asked for, a part at a time."""
        if state:
            self.kept[name] = _compress(state) if self.bits == 8 else {k: _to(v, "cpu") for k, v in state.items()}

    def take(self, name: str, device: torch.device) -> dict[str, Any]:
        """Remove a state from the store and bring it to the device; empty if there is none."""
        return {key: _to(value, device) for key, value in expand_state(self.kept.pop(name, {})).items()}

    @property
    def num_bytes(self) -> int:
        """Host memory of all states."""
        return sum(v.nbytes for state in self.kept.values() for v in state.values() if isinstance(v, Tensor))


def gather_states(states: Sequence[dict[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """The state of a slice from those of its pieces, in order, without a copy: what was cut becomes `Parts`.

    Args:
        sizes: elements of each piece.
    """
    if len(states) <= 1 or not all(states):
        return dict(states[0]) if states else {}
    return {
        key: Parts(tuple(state[key] for state in states)) if _is_cut(key, value, sizes[0]) else value
        for key, value in states[0].items()
    }


def merge_states(states: Sequence[dict[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """`gather_states`, with every vector in one tensor, on the host."""
    gathered = gather_states(states, sizes)
    return {key: value.joined("cpu") if isinstance(value, Parts) else value for key, value in gathered.items()}


def split_state(state: dict[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The reverse of `merge_states`; every piece gets its own copy of what pieces share."""
    if len(sizes) <= 1 or not state:
        return [dict(state) for _ in sizes]
    total = sum(sizes)
    pieces: list[dict[str, Any]] = [{} for _ in sizes]
    for key, value in state.items():
        if not _is_cut(key, value, total):
            parts: Sequence[Any] = [value.clone() if isinstance(value, Tensor) else value for _ in sizes]
        elif value.numel() == total:
            parts = value.split(list(sizes))
        else:
            parts = value.split([-(-size // OPTIMIZER_BLOCK) for size in sizes])
        for piece, part in zip(pieces, parts, strict=True):
            piece[key] = part
    return pieces


def expand_state(small: dict[str, Any]) -> dict[str, Any]:
    """A state as the optimizer made it, from one that may have been compressed."""
    backend = backend_for_config(DynamicInt8Config(_BLOCK), torch.float32)
    state: dict[str, Any] = {}
    for key, value in small.items():
        if key.endswith((_CODES, _SCALES)):
            continue
        if not key.endswith(_ROOT):
            state[key] = value
            continue
        name = key.removesuffix(_ROOT)
        numel, is_square = value
        vector = backend.dequantize(small[name + _CODES], small[name + _SCALES], (1, numel)).view(-1)
        if is_square:
            table = dynamic_map(vector.device)
            scales = small[name + _SCALES].view(torch.float32).view(-1)
            smallest = scales.repeat_interleave(_BLOCK)[:numel] * table[table > 0].min()
            vector = torch.maximum(vector, smallest).square()
        state[name] = vector
    return state


def _is_cut(key: str, value: Any, numel: int) -> bool:
    """Whether a value has an element per weight or per block of weights. (Code books are as long as a block.)"""
    if not isinstance(value, Tensor) or value.dim() != 1 or key.startswith("qmap"):
        return False
    return value.numel() in (numel, -(-numel // OPTIMIZER_BLOCK))


def _compress(state: dict[str, Any]) -> dict[str, Any]:
    if any(isinstance(value, (Tensor, Parts)) and value.dtype == torch.uint8 for value in state.values()):
        return {key: _to(value, "cpu") for key, value in state.items()}  # its code book must stay what it is
    backend = backend_for_config(DynamicInt8Config(_BLOCK), torch.float32)
    small: dict[str, Any] = {}
    for key, value in state.items():
        vector = Parts((value,)) if isinstance(value, Tensor) and value.dim() == 1 else value
        if not isinstance(vector, Parts) or vector.dtype != torch.float32:
            small[key] = _to(value, "cpu")
            continue
        is_square = all(bool(part.min() >= 0) for part in vector.tensors)
        codes, scales = [], []
        for run in vector.runs(COMPRESS_ELEMENTS):
            made = backend.quantize(run.sqrt() if is_square else run, run.numel(), lambda rows: rows)
            codes.append(made[0].cpu())
            scales.append(made[1].cpu())
        small[key + _CODES], small[key + _SCALES] = torch.cat(codes), torch.cat(scales)
        small[key + _ROOT] = (vector.numel, is_square)
    return small


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Parts):
        return value.joined(device)
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
