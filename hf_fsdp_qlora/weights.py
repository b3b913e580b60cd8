"""The stream from checkpoint tensors to local shards.

Every rank walks the same list in the same order and reads only its own part of each tensor, so a node reads the
checkpoint once. Quantised weights are cut by rows, everything else by dim 0 as FSDP2 cuts it. With replicated rows
(DDP) each rank quantises its part and the parts are gathered. Where the backend must see a whole tensor, the ranks
take turns: each reads and quantises a tensor of its own, and the rows are handed out. With several replicas (HSDP)
each reads the whole checkpoint, its ranks a part each, and statistics are gathered inside it: a replica on one node
sends no weights to another node while it loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers.utils.logging import tqdm

from hf_fsdp_qlora.checkpoint import StoredTensor, TensorSlice, stream_slices
from hf_fsdp_qlora.distributed import rank, same_outcome, world_size
from hf_fsdp_qlora.formats import shard_range
from hf_fsdp_qlora.integrity import fingerprint
from hf_fsdp_qlora.linear import QuantizedLinear, as_bytes
from hf_fsdp_qlora.owners import quantize_and_hand_out
from hf_fsdp_qlora.quantization.stored import PackedWeight
from hf_fsdp_qlora.sharding import RowRanks, local_range, local_tensor, row_ranks

PLAIN_PIECE_BYTES = 64 * 2**20
"""An unquantised tensor is read and copied in pieces of this size, so that the device never holds it twice."""


@dataclass(frozen=True)
class PlannedWeight:
    """One tensor of the checkpoint and the parameter or persistent buffer it fills.

    Args:
        module: the owner.
        name: the owner's name for it ("weight").
        stored: where the values lie.
    """

    module: nn.Module
    name: str
    stored: StoredTensor

    @property
    def is_quantized(self) -> bool:
        """Whether the values become rows."""
        return isinstance(self.module, QuantizedLinear) and self.name == "weight"

    @property
    def needs_owner(self) -> bool:
        """Whether one rank must quantise the whole tensor."""
        if not self.is_quantized or isinstance(self.stored, PackedWeight):
            return False
        return cast(QuantizedLinear, self.module).backend.whole_tensor

    @property
    def target(self) -> Tensor:
        """The parameter or buffer as it is now; FSDP2 replaces parameters when it shards."""
        return getattr(self.module, self.name)


def fill(weights: Sequence[PlannedWeight], *, device: torch.device) -> int:
    """Read, quantise and store this rank's part of every weight, and fingerprint the rows.

    Collective; every rank passes the same list. A rank that cannot read or quantise goes on as if it owned nothing,
    so that no collective is missing, and the error is raised on every rank at the end.

    Args:
        device: where values are cast and quantised.

    Returns:
        Bytes that this rank read.

    Raises:
        OSError, RuntimeError: on the ranks that failed; a RuntimeError that quotes it on the others.
    """
    weights = sorted(weights, key=lambda weight: (str(weight.stored.path), weight.stored.offset))
    for backend in {weight.module.backend for weight in weights if isinstance(weight.module, QuantizedLinear)}:
        backend.prepare(device)
    slices = [_slices(weight, owner) for weight, owner in zip(weights, _owners(weights), strict=True)]
    pieces = [piece for of_weight in slices for piece in of_weight]
    errors: list[Exception] = []
    total = sum(piece.num_bytes for piece in pieces)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=rank() != 0) as progress:
        stream = _read_on(pieces, device, errors)
        round_of_owners: list[tuple[QuantizedLinear, Tensor]] = []
        for weight, of_weight in zip(weights, slices, strict=True):
            if not weight.is_quantized:
                _copy_plain(weight.target, islice(stream, len(of_weight)), errors)
                progress.update(sum(piece.num_bytes for piece in of_weight))
                continue
            values = [next(stream) for _ in of_weight]
            if weight.needs_owner:
                round_of_owners.append((cast(QuantizedLinear, weight.module), values[0]))
                if len(round_of_owners) == row_ranks(weight.target).size:
                    _raise_on_every_rank(errors)
                    quantize_and_hand_out(round_of_owners)
                    round_of_owners.clear()
            else:
                _store_rows(weight.module, values, weight.stored, errors)  # type: ignore[arg-type]
            del values  # before the next slices are read ahead
            progress.update(sum(piece.num_bytes for piece in of_weight))
        if round_of_owners:
            _raise_on_every_rank(errors)
            quantize_and_hand_out(round_of_owners)
    _raise_on_every_rank(errors)
    _gather_fingerprints([weight.module for weight in weights if weight.is_quantized])  # type: ignore[misc]
    return total


def _gather_fingerprints(layers: list[QuantizedLinear]) -> None:
    """Of each rank's part of the rows make those of all rows, on the host.

    In one collective and one copy: those of a layer would wait for its work while nothing new is queued.
    """
    if not layers:
        return
    ranks = row_ranks(layers[0].weight)
    chunks = [_chunk(layer, ranks) for layer in layers]
    parts = [cast(Tensor, layer.row_fingerprints) for layer in layers]
    mine = torch.cat([pad(part, (0, chunk - len(part))) for part, chunk in zip(parts, chunks, strict=True)])
    for layer, prints in zip(layers, _gather(mine, ranks).cpu().split(chunks, dim=1), strict=True):
        layer.row_fingerprints = prints.flatten()[: layer.num_rows]


def _raise_on_every_rank(errors: list[Exception]) -> None:
    with same_outcome("loading the weights"):
        if errors:
            raise errors[0]


def _owners(weights: Sequence[PlannedWeight]) -> list[int | None]:
    """Which of a weight's ranks reads all of it, or None where every rank reads its part."""
    turn = count()
    return [next(turn) % row_ranks(weight.target).size if weight.needs_owner else None for weight in weights]


def _slices(weight: PlannedWeight, owner: int | None) -> list[TensorSlice]:
    """What this rank reads: a run of the tensor, or for a weight that is quantised already, a run of each part."""
    if owner is not None:
        reads = owner == row_ranks(weight.target).index
        return [TensorSlice(weight.stored, 0, weight.stored.numel if reads else 0)]
    if isinstance(weight.stored, PackedWeight):
        return weight.stored.row_slices(*_rows_to_make(cast(QuantizedLinear, weight.module)))
    first, last = _elements(weight)
    if weight.is_quantized:
        return [TensorSlice(weight.stored, first, last)]
    # An embedding is the largest tensor of many models; nothing needs it whole on the way to its place.
    step = PLAIN_PIECE_BYTES // weight.stored.dtype.itemsize
    return [TensorSlice(weight.stored, at, min(at + step, last)) for at in range(first, last, step)]


def _copy_plain(target: Tensor, values: Iterator[Tensor], errors: list[Exception]) -> None:
    """Copy the pieces of an unquantised tensor, in order, into this rank's part of it."""
    flat = None if target.is_meta else local_tensor(target).view(-1)
    done = 0
    for piece in values:
        if flat is not None and not errors:
            flat[done : done + len(piece)].copy_(piece)
        done += len(piece)
        del piece  # before the next slices are read ahead


def _elements(weight: PlannedWeight) -> tuple[int, int]:
    """The run of the flattened tensor that this rank reads."""
    numel = weight.stored.numel
    if isinstance(weight.module, QuantizedLinear) and weight.is_quantized:
        first, last = _rows_to_make(weight.module)
        row_size = weight.module.backend.format.row_size
        return min(first * row_size, numel), min(last * row_size, numel)
    if weight.target.is_meta:  # under FSDP1 rank 0 alone has values
        return 0, 0
    first, last = local_range(weight.target) if weight.target.dim() else (0, 1)
    length = weight.target.shape[0] if weight.target.dim() else 1
    per_index = numel // length if length else 0
    return first * per_index, last * per_index


def _rows_to_make(layer: QuantizedLinear) -> tuple[int, int]:
    """The rows this rank quantises: its own, or an equal part of replicated ones."""
    if isinstance(layer.weight, DTensor):
        return local_range(layer.weight)
    return shard_range(layer.num_rows, rank(), world_size())


def _store_rows(layer: QuantizedLinear, values: list[Tensor], stored: StoredTensor, errors: list[Exception]) -> None:
    def gather_rows(part: Tensor) -> Tensor:
        return _gather_rows(part, layer)

    codes, stats, layer.row_fingerprints = _make_rows(layer, values, stored, errors)
    if not isinstance(layer.weight, DTensor):
        codes, stats = gather_rows(codes), gather_rows(stats)
    if not errors:
        as_bytes(local_tensor(layer.weight)).copy_(codes)
        as_bytes(local_tensor(layer.weight_stats)).copy_(stats)


def _make_rows(
    layer: QuantizedLinear, values: list[Tensor], stored: StoredTensor, errors: list[Exception]
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows and their fingerprints, or after an error none: as from a rank that owns none, with the gathers
    others wait in."""
    gathered = 0

    def gather_rows(part: Tensor) -> Tensor:
        nonlocal gathered
        gathered += 1
        return _gather_rows(part, layer)

    def gather_the_rest(part: Tensor) -> Tensor:
        nonlocal gathered
        gathered -= 1
        return part.new_ones(layer.num_rows, part.shape[1]) if gathered >= 0 else _gather_rows(part, layer)

    first, last = _rows_to_make(layer)
    try:
        if not errors:
            if isinstance(stored, PackedWeight):
                codes, stats = stored.rows(values, last - first)
            else:
                codes, stats = layer.backend.quantize(values[0].to(layer.dtype), stored.numel, gather_rows)
            return codes, stats, fingerprint(codes, stats)
    except Exception as error:  # noqa: BLE001  (out of memory, or whatever a backend raises: the others wait)
        errors.append(error)
    row = layer.backend.format
    if isinstance(stored, PackedWeight):
        empty = values[0].new_empty(0, dtype=torch.uint8)
        codes, stats = empty.view(0, row.code_bytes), empty.view(0, row.stats_bytes)
    else:
        nothing = values[0].new_empty(0, dtype=layer.dtype)
        codes, stats = layer.backend.quantize(nothing, stored.numel, gather_the_rest)
    return codes, stats, fingerprint(codes, stats)


def _gather_rows(part: Tensor, layer: QuantizedLinear) -> Tensor:
    """(local_rows, k) of the ranks that share the layer's rows -> (num_rows, k) on each of them."""
    ranks = row_ranks(layer.weight)
    if ranks.size == 1:
        return part
    padded = pad(part, (0, 0, 0, _chunk(layer, ranks) - len(part))).contiguous()
    return _gather(padded, ranks).flatten(0, 1)[: layer.num_rows]


def _chunk(layer: QuantizedLinear, ranks: RowRanks) -> int:
    """How many rows every rank but the last owns."""
    return -(-layer.num_rows // ranks.size)


def _gather(part: Tensor, ranks: RowRanks) -> Tensor:
    """(...) of each rank -> (ranks, ...) on each of them."""
    if ranks.size == 1:
        return part[None]
    whole = part.new_empty(ranks.size, *part.shape)
    dist.all_gather_into_tensor(whole.view(-1), part.view(-1), group=ranks.group)
    return whole


def _read_on(slices: list[TensorSlice], device: torch.device, errors: list[Exception]) -> Iterator[Tensor]:
    stream = stream_slices(slices, device)
    for piece in slices:
        if not errors:
            try:
                yield next(stream)
                continue
            except (OSError, RuntimeError) as error:
                errors.append(error)
        yield torch.empty(0, dtype=piece.tensor.dtype, device=device)
