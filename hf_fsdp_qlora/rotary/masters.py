"""The durable weights: one flat tensor per parameter in host memory, of which each rank holds its slice.

Rank r owns elements [r * c, (r + 1) * c) of the flattened parameter, c = ceil(n / ranks) rounded up to whole blocks of
256: a blockwise optimizer's states can then be divided among another number of ranks. A slice starts as a memory map
of the checkpoint's own file, which costs nothing until it is read, and becomes a private copy when its parameter is
first trained. Nothing is ever re-derived from a lower precision than the masters have: over 30 visits that loses most
of a small drift (BAdam's fp32 copies made from bf16 weights keep 18 % of it).

The maps stay valid when a checkpoint is replaced by rename, as every writer here does; a file that is truncated or
overwritten in place while it is mapped would change the weights of parameters that were not trained yet.

Left out: pinned memory for the masters themselves (a 70B model's would pin 280 GB); whoever copies to a device passes
its own pinned staging buffer to `Masters.load`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from hf_fsdp_qlora.checkpoint import StoredTensor
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.quantization.stored import PackedWeight

SLICE_UNIT = 256
"""Weights that are never divided between ranks: a block of bitsandbytes' 8-bit optimizers."""

_LOW_BITS = 2**16
"""What bfloat16 cuts off a float32."""


class Masters:
    """This rank's slice of the master of every parameter.

    Args:
        stored: where the values of each parameter begin, by the model's name for it.
        dtype: of the private copies: float32, or bfloat16 (then the caller rounds stochastically, see
            `stochastic_round`).
        rank: of this process.
        world_size: over how many the masters are divided.

    Raises:
        ConfigError: a weight is stored in 4 bits, so that there is no full-precision value to begin with.
    """

    def __init__(
        self, stored: Mapping[str, StoredTensor], *, dtype: torch.dtype, rank: int = 0, world_size: int = 1
    ) -> None:
        packed = [name for name, tensor in stored.items() if isinstance(tensor, PackedWeight)]
        if packed:
            raise ConfigError(
                f"The checkpoint stores {len(packed)} weights in 4 bits ({packed[0]}, ...), and rotary training needs "
                "their full-precision values. Load the checkpoint that it was quantised from."
            )
        self.stored = dict(stored)
        self.dtype = dtype
        self.rank = rank
        self.world_size = world_size
        self._maps: dict[Path, mmap.mmap] = {}
        self._private: dict[str, Tensor] = {}
        # Values that were put aside; None where they are the checkpoint's own.
        self._starts: dict[str, Tensor | None] = {}

    def slice_bounds(self, name: str) -> tuple[int, int]:
        """First and past-the-last element of the flattened parameter that this rank owns."""
        return slice_bounds(self.stored[name].numel, self.rank, self.world_size)

    def padded_numel(self, name: str) -> int:
        """Elements of a buffer with equal room for the slice of every rank; with one rank, just the parameter's."""
        numel = self.stored[name].numel
        return numel if self.world_size == 1 else self.world_size * _chunk(numel, self.world_size)

    def load(self, name: str, out: Tensor) -> None:
        """Copy this rank's slice into `out`.

        Args:
            out: (slice length,) of any dtype, on any device.
        """
        out.copy_(self.current(name))

    def current(self, name: str) -> Tensor:
        """(slice length,) this rank's slice as it is, not copied: the private one, or else `original`."""
        own = self._private.get(name)
        return self.original(name) if own is None else own

    def store(self, name: str, values: Tensor) -> None:
        """Make `values` the master of this rank's slice; what was there before stays until all of it is copied.

        Args:
            values: (slice length,) in `dtype`, on any device.
        """
        assert values.dtype == self.dtype, f"{name}: {values.dtype} would be rounded to {self.dtype}"
        own = self._private.get(name)
        if own is None:
            first, last = self.slice_bounds(name)
            own = self._private[name] = torch.empty(last - first, dtype=self.dtype)
        own.copy_(values)

    def put_aside(self, name: str) -> None:
        """Keep the values as they are now, which `start` returns until they are dropped; of several times, the first
        counts. Called before the middle of a visit is stored, so that its end still knows what the visit changed."""
        if name not in self._starts:
            self._starts[name] = self._private[name].clone() if name in self._private else None

    def start(self, name: str) -> Tensor:
        """(slice length,) what was put aside, or else `current`."""
        if name not in self._starts:
            return self.current(name)
        start = self._starts[name]
        return self.original(name) if start is None else start

    def starts(self) -> Iterator[tuple[str, Tensor]]:
        """What is put aside, in the order of the parameters, not copied."""
        return ((name, self.start(name)) for name in self.stored if name in self._starts)

    def set_start(self, name: str, values: Tensor) -> None:
        """Put aside `values`, (slice length,) of any dtype; not copied."""
        self._starts[name] = values

    def drop_start(self, name: str) -> None:
        """Forget what was put aside, if anything was."""
        self._starts.pop(name, None)

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """The private copies, which differ from the checkpoint, in the order of the parameters."""
        return ((name, self._private[name]) for name in self.stored if name in self._private)

    def is_trained(self, name: str) -> bool:
        """Whether there is a private copy."""
        return name in self._private

    def forget(self) -> None:
        """Drop every private copy: the masters are the checkpoint's values again. And what was put aside."""
        self._private.clear()
        self._starts.clear()

    @property
    def private_bytes(self) -> int:
        """Host memory of the private copies of this rank, and of what it put aside."""
        aside = (start for start in self._starts.values() if start is not None)
        return sum(tensor.nbytes for tensor in (*self._private.values(), *aside))

    def original(self, name: str) -> Tensor:
        """(slice length,) this rank's slice as the checkpoint has it, in its dtype: a map of the file."""
        stored = self.stored[name]
        first, last = self.slice_bounds(name)
        if first == last:
            return torch.empty(0, dtype=stored.dtype)
        if stored.path not in self._maps:
            with open(stored.path, "rb") as file:
                # ACCESS_COPY, because torch warns about memory that it could not write; nothing writes to it.
                self._maps[stored.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        offset = stored.offset + first * stored.dtype.itemsize
        return torch.frombuffer(self._maps[stored.path], dtype=stored.dtype, count=last - first, offset=offset)


def slice_bounds(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and past-the-last element that a rank owns of a flattened parameter."""
    chunk = _chunk(numel, world_size)
    return min(rank * chunk, numel), min((rank + 1) * chunk, numel)


def gather_whole(masters: Masters, name: str, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The whole parameter, from the slices of all ranks. Collective, when the masters are divided.

    Args:
        dtype: to cast to; before the slices travel.
        device: one that the process group can communicate from.

    Returns:
        In the shape of the parameter, on every rank.
    """
    shape, numel = masters.stored[name].shape, masters.stored[name].numel
    first, last = masters.slice_bounds(name)
    own = torch.empty(last - first, dtype=dtype, device=device)
    masters.load(name, own)
    if masters.world_size == 1:
        return own.view(shape)
    whole = torch.empty(masters.padded_numel(name), dtype=dtype, device=device)
    dist.all_gather_into_tensor(whole, pad(own, (0, whole.numel() // masters.world_size - own.numel())))
    return whole[:numel].view(shape)


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round to bfloat16, up or down with the probability that makes the mean exact.

    A bf16 weight takes an update only if it is above 1/512 of the weight; rounded to nearest, smaller ones are lost
    for good, and with this they arrive on average.

    Args:
        values: float32.
        generator: on the device of `values`.

    Returns:
        bfloat16 of the same shape. Infinities and NaN stay what they are.
    """
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device).random_(
        0, _LOW_BITS, generator=generator
    )
    bits = noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-_LOW_BITS)
    return torch.where(values.isfinite(), bits.view(torch.float32), values).to(torch.bfloat16)


def _chunk(numel: int, world_size: int) -> int:
    units = -(-numel // SLICE_UNIT)
    return -(-units // world_size) * SLICE_UNIT
