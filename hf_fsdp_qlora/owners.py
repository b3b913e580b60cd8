"""Rows of a backend that must see the whole tensor: one rank owns the tensor, quantises it and hands out the rows.

Owners change from tensor to tensor, and as many tensors as there are ranks are quantised at the same time before their
rows travel. A rank holds one whole tensor at a time, and no other rank ever reads it. With several replicas (HSDP)
each does this among its own ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from hf_fsdp_qlora.distributed import same_outcome
from hf_fsdp_qlora.integrity import fingerprint
from hf_fsdp_qlora.linear import QuantizedLinear, as_bytes
from hf_fsdp_qlora.sharding import RowRanks, local_tensor, row_ranks


def quantize_and_hand_out(tensors: Sequence[tuple[QuantizedLinear, Tensor]]) -> None:
    """Quantise up to one tensor per rank, and store every rank's rows, and the fingerprints of its part of them.

    Collective; every rank passes the same layers.

    Args:
        tensors: each layer and its weights: (numel,) on the rank whose turn it is (the first rank for the first
            layer, and so on), anything on the device of the work elsewhere.

    Raises:
        Exception: the backend's own error on the ranks where it failed; a RuntimeError quoting it on the others.
    """
    made: tuple[Tensor, Tensor] | None = None
    ranks = row_ranks(tensors[0][0].weight)
    with same_outcome("quantising a weight"):
        if ranks.index < len(tensors):
            layer, weights = tensors[ranks.index]
            made = layer.backend.quantize(weights.to(layer.dtype), weights.numel(), lambda rows: rows)
    for owner, (layer, weights) in enumerate(tensors):
        _hand_out(layer, made if owner == ranks.index else None, owner, ranks, weights.device)


def _hand_out(
    layer: QuantizedLinear, made: tuple[Tensor, Tensor] | None, owner: int, ranks: RowRanks, device: torch.device
) -> None:
    prints = None if made is None else fingerprint(*made).to(device)[:, None].view(torch.uint8)
    layer.row_fingerprints = _scatter(prints, (layer.num_rows, 8), owner, ranks, device).view(torch.int64)[:, 0]
    for index, parameter in enumerate((layer.weight, layer.weight_stats)):
        rows = None if made is None else made[index]
        local = as_bytes(local_tensor(parameter))
        shape = (layer.num_rows, local.shape[1])
        if isinstance(parameter, DTensor):
            local.copy_(_scatter(rows, shape, owner, ranks, device)[: len(local)])
        else:
            local.copy_(_broadcast(rows, shape, owner, ranks, device))


def _broadcast(
    rows: Tensor | None, shape: tuple[int, int], owner: int, ranks: RowRanks, device: torch.device
) -> Tensor:
    """The owner's (num_rows, k) on each of `ranks`; None elsewhere."""
    if rows is None:
        rows = torch.empty(shape, dtype=torch.uint8, device=device)
    if ranks.size > 1:
        dist.broadcast(rows, group_src=owner, group=ranks.group)
    return rows


def _scatter(rows: Tensor | None, shape: tuple[int, int], owner: int, ranks: RowRanks, device: torch.device) -> Tensor:
    """This rank's rows of the owner's (num_rows, k): (ceil(num_rows / ranks), k), zeros behind the last one."""
    if ranks.size == 1:
        assert rows is not None
        return rows
    chunk = -(-shape[0] // ranks.size)
    parts = None
    if rows is not None:
        padded = pad(rows, (0, 0, 0, ranks.size * chunk - shape[0]))
        parts = list(padded.view(ranks.size, chunk, shape[1]).unbind())
    mine = torch.empty(chunk, shape[1], dtype=torch.uint8, device=device)
    dist.scatter(mine, parts, group_src=owner, group=ranks.group)
    return mine
