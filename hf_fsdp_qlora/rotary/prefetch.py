"""Bring the masters of the next blocks near the device while the current ones train.

Reading a master that still is the checkpoint's file costs disk time, and pageable memory cannot be copied while the
device computes. So a thread copies the slices of the next visit into pinned staging buffers as soon as the current
visit has begun, and at the rotation they cross to the device on a stream of their own. Only the staging is pinned: as
much host memory as the master slices of one visit have, and no device memory before the rotation.

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
    """

    def __init__(self, masters: Masters, device: torch.device) -> None:
        self.masters = masters
        self._staged: dict[str, Future[Tensor]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            # A thread of its own begins on device 0, where pinning memory would open a context.
            self._pool = ThreadPoolExecutor(1, "rotary-prefetch", torch.cuda.set_device, (device,))
            self._stream = torch.cuda.Stream(device)

    def start(self, names: Sequence[str]) -> None:
        """Stage these slices in the background. Their masters must not be stored to before they are loaded."""
        if self._pool is not None:
            self._staged = {name: self._pool.submit(self._stage, name) for name in names}

    def load(self, name: str, out: Tensor) -> None:
        """Copy a slice to the device, from its staging buffer if there is one.

        Args:
            out: (slice length,) in the masters' dtype. Work that is queued on the current stream afterwards sees it.
        """
        staged = self._staged.pop(name, None)
        if staged is None or self._stream is None:
            self.masters.load(name, out)
            return
        self._stream.wait_stream(torch.cuda.current_stream(out.device))  # the memory may still be in use
        with torch.cuda.stream(self._stream):
            out.copy_(staged.result(), non_blocking=True)
        out.record_stream(self._stream)
        torch.cuda.current_stream(out.device).wait_stream(self._stream)

    def clear(self) -> None:
        """Forget what was staged and not loaded. (torch reuses pinned memory only when copies out of it are done.)"""
        for left in self._staged.values():
            left.cancel()
        self._staged = {}

    def _stage(self, name: str) -> Tensor:
        first, last = self.masters.slice_bounds(name)
        buffer = torch.empty(last - first, dtype=self.masters.dtype, pin_memory=True)
        self.masters.load(name, buffer)
        return buffer
