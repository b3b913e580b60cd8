"""What lives in memory while operators run, for the planner's tests."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LivingBytes(TorchDispatchMode):
    """Bytes of all storages that operators have seen and that still live, the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by next
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                self.see(leaf)
        self.peak = max(self.peak, self.now())
        return result

    def see(self, tensor: Tensor) -> None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        self.storages.setdefault(storage._cdata, weakref.ref(storage))

    def now(self) -> int:
        """FSDP frees and allocates by resizing storages, so sizes are asked for each time."""
        living = {key: ref() for key, ref in self.storages.items()}
        self.storages = {key: self.storages[key] for key, storage in living.items() if storage is not None}
        return sum(storage.nbytes() for storage in living.values() if storage is not None)
