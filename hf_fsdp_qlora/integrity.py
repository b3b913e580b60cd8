"""Fingerprints of quantised rows, taken when they were made and compared with what an all-gather brings back.

A row's fingerprint is the sum of its 32-bit words, each times an odd random constant, modulo 2**64: cheap on any
device, and any single changed word changes it. Codes and statistics are both covered.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from hf_fsdp_qlora.distributed import world_size
from hf_fsdp_qlora.linear import QuantizedLinear, as_bytes
from hf_fsdp_qlora.sharding import gathered_rows, is_sharded, local_tensor, replica_group

ROWS_AT_ONCE = 2048
"""Bounds the temporary memory: 2,048 rows of 8 KiB widen to 32 MiB."""
BYTES_AT_ONCE = 2**24
"""Likewise: summed as bytes they widen to 128 MiB."""


class IntegrityError(RuntimeError):
    """Quantised bytes are not what was loaded; going on would train on a damaged model."""


def fingerprint(codes: Tensor, stats: Tensor) -> Tensor:
    """One number per row.

    Args:
        codes: (rows, code_bytes) uint8.
        stats: (rows, stats_bytes) uint8.

    Returns:
        (rows,) int64 on the device of the rows; nothing waits for it here.
    """
    return _sum_of_words(codes, seed=1) + _sum_of_words(stats, seed=2)


def check_integrity(model: nn.Module, *, max_groups: int | None = None) -> int:
    """Compare every gathered row with its fingerprint at load time.

    Collective when the model is sharded: call it on every rank.

    Args:
        max_groups: look at the first so many FSDP groups only; None looks at all.

    Returns:
        The number of rows that were compared.

    Raises:
        IntegrityError: on every rank, naming the first damaged layer and the number of damaged rows.
    """
    names = {id(module): name for name, module in model.named_modules()}
    damaged: list[tuple[str, int]] = []
    compared = 0
    for group in islice(gathered_rows(model), max_groups):
        counts: dict[str, Tensor] = {}  # on the device until the whole group is done: each read would wait for it
        for layer in group:
            expected = layer.row_fingerprints
            if expected is None:
                continue
            now = fingerprint(as_bytes(layer.weight.detach()), as_bytes(layer.weight_stats.detach()))
            counts[names[id(layer)]] = (now != expected.to(now.device)).sum()
            compared += len(now)
        if counts:
            found = torch.stack([*counts.values()]).tolist()
            damaged += [(name, wrong) for name, wrong in zip(counts, found, strict=True) if wrong]
    _raise_on_every_rank(
        f"{sum(wrong for _, wrong in damaged)} of {compared} quantised rows differ from what was loaded, in "
        f"{len(damaged)} layers; the first is {damaged[0][0]}. Something cast or overwrote the bytes (a "
        "mixed-precision policy, .to(dtype), a bf16 copy). Do not use this run's results."
        if damaged else None
    )  # fmt: skip
    return compared


def check_replicas(model: nn.Module) -> None:
    """Compare the values that several ranks read for themselves and that FSDP2 takes for equal without looking: those
    of replicas (HSDP), and frozen parameters that are whole on every rank (outside.py). A node with another revision
    of the checkpoint would train on, and every gradient would be the mean over two models.

    Collective. Quantised rows are compared by their fingerprints, other parameters by the sum of their bytes.

    Raises:
        IntegrityError: on every rank, naming the first parameter that differs.
    """
    named = [*model.named_parameters()]
    replicated = [(name, parameter) for name, parameter in named if replica_group(parameter) is not None]
    if replicated:
        _compare(model, replicated, replica_group(replicated[0][1]))
    whole = [(name, p) for name, p in named if not isinstance(p, DTensor) and not p.requires_grad]
    if whole and is_sharded(model) and world_size() > 1:
        _compare(model, whole, None)


def _compare(model: nn.Module, named: list[tuple[str, nn.Parameter]], group: ProcessGroup | None) -> None:
    prints = {id(m.weight): m.row_fingerprints for m in model.modules() if isinstance(m, QuantizedLinear)}
    sums = []
    for _, parameter in named:
        rows = prints.get(id(parameter))
        sums.append((_sum_of_bytes(local_tensor(parameter)) if rows is None else rows.sum()).cpu())
    device = next(p.device_mesh.device_type for p in model.parameters() if isinstance(p, DTensor))
    mine = torch.stack(sums).to(device)
    of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_all, mine, group=group)
    different = [name for index, (name, _) in enumerate(named) if any(other[index] != mine[index] for other in of_all)]
    _raise_on_every_rank(
        f"{len(different)} of {len(named)} parameters differ between replicas; the first is {different[0]}. "
        "The nodes did not read the same checkpoint: give a revision, or copy one folder to all of them."
        if different else None
    )  # fmt: skip


def _raise_on_every_rank(problem: str | None) -> None:
    """Raise this rank's problem, or that of the first rank that has one. Collective: rows that are whole on every
    rank (DDP) may be damaged on one alone, and the others would wait for it in the next step."""
    of_all = [problem] * world_size()
    if world_size() > 1:
        dist.all_gather_object(of_all, problem)
    elsewhere = next((f"On rank {index}: {other}" for index, other in enumerate(of_all) if other is not None), None)
    if elsewhere is not None:
        raise IntegrityError(problem or elsewhere)


def _sum_of_bytes(values: Tensor) -> Tensor:
    """The sum of the bytes, or of words of 8 where they lie so: a cast of all bytes would take 8 times the tensor."""
    flat = values.reshape(-1)
    aligned = not (flat.numel() * flat.itemsize % 8 or flat.storage_offset() * flat.itemsize % 8)
    words = flat.view(torch.int64 if aligned else torch.uint8)
    pieces = [piece.sum(dtype=torch.int64) for piece in words.split(BYTES_AT_ONCE // words.itemsize)]
    return torch.stack(pieces).sum() if pieces else torch.zeros((), dtype=torch.int64, device=values.device)


def _sum_of_words(rows: Tensor, seed: int) -> Tensor:
    if not len(rows):
        return torch.zeros(0, dtype=torch.int64, device=rows.device)
    words = rows.view(torch.int32)
    factors = _odd_factors(words.shape[1], seed, words.device)
    return torch.cat([(part.long() * factors).sum(dim=1) for part in words.split(ROWS_AT_ONCE)])


@lru_cache(maxsize=64)
def _odd_factors(count: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device)
