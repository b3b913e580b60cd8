"""bitsandbytes 4-bit weights as checkpoints hold them, and how those bytes become rows.

A weight `X.weight` of such a checkpoint is several tensors: the codes under its own name, `absmax`, tables, and a JSON
object with its shape and dtype. The codes are bytes whatever dtype they are stored as, two weights each in the order
of the weight, so the rows of one rank are one byte range of each tensor, and nothing is computed to make them.

Source: `QuantState.as_dict(packed=True)` of bitsandbytes and `Linear4bit._save_to_state_dict`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from hf_fsdp_qlora.checkpoint import StoredTensor, TensorSlice, stream_slices
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.formats import NESTED_BLOCKS
from hf_fsdp_qlora.quantization.base import in_rows, share_backend
from hf_fsdp_qlora.quantization.bitsandbytes import BLOCK_SIZES, FourBitBackend

_PART = re.compile(
    r"(?P<weight>.+\.weight)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
)
_STATE = "quant_state.bitsandbytes__"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class PackedWeight(StoredTensor):
    """A weight that is in 4 bits already. `shape` and `dtype` are those of the weight that was quantised.

    Args:
        backend: the format of its rows; its `dtype` is what the caller wants to dequantise to.
        parts: the codes and the absmax values, with double quantisation also the second-level ones; flat, the codes
            as uint8.
        absmax_offset: what double quantisation subtracted, None without it.
    """

    backend: FourBitBackend
    parts: tuple[StoredTensor, ...]
    absmax_offset: float | None

    def row_slices(self, first: int, last: int) -> list[TensorSlice]:
        """The bytes of rows `first` to `last`, one slice of each part."""
        per_row = (self.backend.format.code_bytes, NESTED_BLOCKS, 1)
        return [
            TensorSlice(part, min(first * width, part.numel), min(last * width, part.numel))
            for part, width in zip(self.parts, per_row, strict=False)
        ]

    def rows(self, parts: Sequence[Tensor], num_rows: int) -> tuple[Tensor, Tensor]:
        """Codes and statistics of those rows, as `FourBitBackend.quantize` lays them out.

        Args:
            parts: what was read for `row_slices`.
            num_rows: how many rows they are.

        Returns:
            codes (num_rows, code_bytes) and statistics (num_rows, stats_bytes), uint8.
        """
        codes = in_rows(parts[0], num_rows, self.backend.format.code_bytes)
        absmax = in_rows(parts[1], num_rows, NESTED_BLOCKS).view(torch.uint8)
        if self.absmax_offset is None:
            return codes, absmax
        offset = torch.full((num_rows, 1), self.absmax_offset, dtype=torch.float32, device=codes.device)
        second = in_rows(parts[2], num_rows, 1)
        return codes, torch.cat([absmax, second.view(torch.uint8), offset.view(torch.uint8)], dim=1)


def find_packed_weights(
    tensors: Mapping[str, StoredTensor], *, dtype: torch.dtype, compute_dtype: torch.dtype
) -> tuple[dict[str, PackedWeight], dict[str, StoredTensor]]:
    """Tell the weights that a checkpoint holds in 4 bits from its other tensors. Reads the quant states alone.

    Args:
        tensors: the whole checkpoint.
        dtype, compute_dtype: for the backends.

    Returns:
        The packed weights by the name of their codes, and the tensors that belong to none.

    Raises:
        ConfigError: a weight's parts are incomplete, do not fit together, or have a layout that rows cannot hold.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        found = _PART.fullmatch(name)
        if found:
            parts.setdefault(found["weight"], {})[found["part"]] = tensor
    states = _read_states(parts)
    tables: list[TensorSlice] = [
        TensorSlice(of_weight["nested_quant_map"], 0, of_weight["nested_quant_map"].numel)
        for of_weight in parts.values()
        if "nested_quant_map" in of_weight
    ]
    if any(not torch.equal(table, bnb.create_dynamic_map()) for table in stream_slices(tables, _HOST)):
        raise ConfigError(
            "The checkpoint's absmax values are quantised with another table (nested_quant_map) than bitsandbytes "
            "makes, which rows do not hold. Load the 16-bit model it was made from."
        )
    packed = {}
    for name, of_weight in parts.items():
        if name not in tensors:
            raise ConfigError(f"The checkpoint has quantisation statistics of {name} but not {name} itself.")
        packed[name] = _packed_weight(name, tensors[name], of_weight, states[name], dtype, compute_dtype)
    others = {name: t for name, t in tensors.items() if name not in packed and not _PART.fullmatch(name)}
    return packed, others


def pack_weight(weight: Tensor, backend: FourBitBackend) -> dict[str, Tensor]:
    """Quantise a whole weight into the tensors of a stock checkpoint.

    Args:
        weight: (out_features, in_features) in the backend's `dtype`.

    Returns:
        The codes under "" and the other parts under their suffixes (".absmax", ...), on the device of `weight`.
    """
    codes, state = bnb.quantize_4bit(
        weight, blocksize=backend.block_size, compress_statistics=backend.nested, quant_type=backend.quant_type
    )
    return {"": codes, **{f".{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}


def _read_states(parts: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, dict[str, Any]]:
    """The JSON object of every weight."""
    stored = {}
    for name, of_weight in parts.items():
        keys = [part for part in of_weight if part.startswith(_STATE)]
        if len(keys) != 1:
            raise ConfigError(
                f"The checkpoint has {len(keys)} tensors {name}.{_STATE}*, one is needed. It was not written by "
                "save_pretrained of a bitsandbytes 4-bit model, or by a version before bitsandbytes 0.41."
            )
        stored[name] = of_weight[keys[0]]
    slices = [TensorSlice(tensor, 0, tensor.numel) for tensor in stored.values()]
    return {
        name: json.loads(bytes(values.tolist()))
        for name, values in zip(stored, stream_slices(slices, _HOST), strict=True)
    }


def _packed_weight(
    name: str,
    codes: StoredTensor,
    parts: Mapping[str, StoredTensor],
    state: dict[str, Any],
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> PackedWeight:
    nested = "nested_absmax" in parts
    if state["dtype"] not in _DTYPES or state["blocksize"] not in BLOCK_SIZES or len(state["shape"]) != 2:
        raise ConfigError(f"{name} has a quant state that cannot be read here: {state}.")
    if nested and (state["nested_blocksize"], state["nested_dtype"]) != (NESTED_BLOCKS, "float32"):
        raise ConfigError(f"{name} has second-level blocks that rows do not hold ({NESTED_BLOCKS} float32): {state}.")
    backend = FourBitBackend(
        state["quant_type"], block_size=state["blocksize"], nested=nested, dtype=dtype, compute_dtype=compute_dtype
    )
    shape = (int(state["shape"][0]), int(state["shape"][1]))
    num_blocks = -(-shape[0] * shape[1] // backend.block_size)
    flat = [
        StoredTensor(codes.path, codes.offset, torch.uint8, (codes.numel * codes.dtype.itemsize,)),
        _typed(name, parts, "absmax", torch.uint8 if nested else torch.float32),
    ]
    wanted = [-(-shape[0] * shape[1] // 2), num_blocks]
    if nested:
        flat.append(_typed(name, parts, "nested_absmax", torch.float32))
        wanted.append(-(-num_blocks // NESTED_BLOCKS))
    if [part.numel for part in flat] != wanted:
        raise ConfigError(
            f"{name} of shape {shape} should have {wanted} codes and statistics, the checkpoint has "
            f"{[part.numel for part in flat]}."
        )
    return PackedWeight(
        path=codes.path, offset=codes.offset, dtype=_DTYPES[state["dtype"]], shape=shape,
        backend=share_backend(backend), parts=tuple(flat), absmax_offset=state["nested_offset"] if nested else None,
    )  # fmt: skip


def _typed(name: str, parts: Mapping[str, StoredTensor], part: str, dtype: torch.dtype) -> StoredTensor:
    stored = parts.get(part)
    if stored is None or stored.dtype != dtype:
        found = "is missing" if stored is None else f"has dtype {stored.dtype}"
        raise ConfigError(f"{name}.{part} {found}; it must have dtype {dtype}.")
    return stored
