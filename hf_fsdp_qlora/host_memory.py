"""Room for offloaded shards in large slabs of host memory, instead of one allocation for each.

torch rounds every pinned allocation up to a power of two, which on shards allocated one by one costs up to as much
again (a tenth on a 70B Llama over two ranks). A slab of a power of two bytes is not rounded, and shards of all sizes
fill it nearly to the end. FSDP2 takes a shard that is pinned already as it is.

Left out: shards that FSDP2 pads (uneven ones). It copies those into pinned memory of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SLAB_BYTES = 2**30
ALIGNMENT = 512
"""Bytes; what CUDA's own allocator aligns to, enough for every dtype and for fast copies."""


def allocate_in_slabs(tensors: Sequence[Tensor], *, pin: bool, slab_bytes: int = SLAB_BYTES) -> list[Tensor]:
    """Uninitialised host tensors of the shapes and dtypes of these, packed into as few slabs as possible.

    Args:
        tensors: on any device, also meta; of any shape and dtype, contiguous.
        pin: whether the slabs are pinned, which needs an accelerator.
        slab_bytes: size of a slab, a power of two. A larger tensor gets a slab of its own.

    Returns:
        One tensor for each, in the same order. A slab lives as long as one of its tensors.
    """
    sizes = [-(-tensor.numel() * tensor.itemsize // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    places: dict[int, tuple[int, int]] = {}  # by index: the slab and the offset in it
    used: list[int] = []
    for index in sorted(range(len(tensors)), key=lambda index: -sizes[index]):  # large first, small ones fill gaps
        slab = next((s for s, size in enumerate(used) if size + sizes[index] <= slab_bytes), len(used))
        if slab == len(used):
            used.append(0)
        places[index] = slab, used[slab]
        used[slab] += sizes[index]
    slabs = [torch.empty(size, dtype=torch.uint8, pin_memory=pin) for size in used]
    return [_part(slabs[slab], offset, tensors[index]) for index, (slab, offset) in sorted(places.items())]


def _part(slab: Tensor, offset: int, like: Tensor) -> Tensor:
    num_bytes = like.numel() * like.itemsize
    return slab[offset : offset + num_bytes].view(like.dtype).view(like.shape)
