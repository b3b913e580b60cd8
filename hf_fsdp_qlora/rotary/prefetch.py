"""Bring the masters of the next blocks near the device while the current ones train.

Reading a master that still is the checkpoint's file costs disk time, and pageable memory cannot be copied while the
device computes. So a thread copies the slices of the next visit into pinned staging memory as soon as the current
visit has begun, and at the rotation they cross to the device on a stream of their own. Only the staging is pinned. It
is allocated once, with room for the largest visit there can be, and filled again for every visit; no device memory is
taken before the rotation.

On the CPU there is nothing to gain, and masters are read when they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hf_fsdp_qlora.rotary.masters import Masters


class Prefetch:
    """Staged master slices.

    Args:
        masters: where they come from.
        device: where they go; nothing is staged for the CPU.
        room: elements of the staging memory, which must hold the slices of any visit.
    """

    def __init__(self, masters: Masters, device: torch.device, *, room: int) -> None:
        self.masters = masters
        self.room = room
        self._staging: Tensor | None = None
        self._staged: dict[str, Future[Tensor]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            # A thread of its own begins on device 0, where pinning memory would open a context.
            self._pool = ThreadPoolExecutor(1, "rotary-prefetch", torch.cuda.set_device, (device,))
            self._stream = torch.cuda.Stream(device)

    def start(self, names: Sequence[str]) -> None:
        """Stage these slices in the background, in place of what was staged before. Their masters must not be stored
        to before they are loaded."""
        if self._pool is None:
            return
        self.clear()
        end = 0
        for name in names:
            first, last = self.masters.slice_bounds(name)
            begin, end = end, end + last - first
            assert end <= self.room, f"{names} have more than {self.room} elements"
            self._staged[name] = self._pool.submit(self._stage, name, begin, end)

    def load(self, name: str, out: Tensor) -> None:
        """Copy a slice to the device, from the staging memory if it is there.

        Args:
            out: (slice length,) in the masters' dtype. Work that is queued on the current stream afterwards sees it.
        """
        staged = self._staged.pop(name, None)
        if staged is None:
            self.masters.load(name, out)
        else:
            self._copy(staged.result(), out)

    def clear(self) -> None:
        """Forget what was staged and not loaded."""
        for left in self._staged.values():
            left.cancel()
        self._staged = {}

    def _copy(self, staged: Tensor, out: Tensor) -> None:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(out.device))  # the memory may still be in use
        with torch.cuda.stream(self._stream):
            out.copy_(staged, non_blocking=True)
        out.record_stream(self._stream)
        torch.cuda.current_stream(out.device).wait_stream(self._stream)

    def _stage(self, name: str, begin: int, end: int) -> Tensor:
        """In the thread, one slice after the other: nothing else writes to the staging memory."""
        if begin == 0:
            self._make_room()
        assert self._staging is not None
        part = self._staging[begin:end]
        self.masters.load(name, part)
        return part

    def _make_room(self) -> None:
        """Wait for the copies of the visit before, or allocate for the first."""
        if self._staging is None:
            self._staging = _pinned(self.room, self.masters.dtype)
        elif self._stream is not None:
            self._stream.synchronize()


def _pinned(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype, pin_memory=True)
