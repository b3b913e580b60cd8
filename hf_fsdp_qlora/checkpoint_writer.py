"""Write a checkpoint front to back while its tensors are still being made: files of bounded size, little memory.

A safetensors file begins with a header that lists everything in it, but what `quantize` and `expand` write is known
only tensor by tensor. So room for the header is left at the front and filled in last; the format allows spaces behind
the JSON. The data must have no gaps, and every tensor is aligned to its item size as safetensors' own writer does it,
for readers that map the file: a tensor of a multiple of 8 bytes is written at once, the few others wait and end the
file, widest dtype first.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_fsdp_qlora.checkpoint import DTYPES
from hf_fsdp_qlora.errors import ConfigError

MAX_SHARD_BYTES = 5 * 10**9
"""transformers' own default ("5GB")."""

_HEADER_BYTES = 2**18
_ENTRY_BYTES = 160
"""More than the JSON of one tensor takes beside its name."""

_ALIGNMENT_BYTES = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A sibling folder to write into, which becomes `target` by one rename if the block succeeds.

    Raises:
        ConfigError: `target` exists and is not an empty folder, or another run is writing it. Nothing is left behind.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"The output {target} exists and is not an empty folder. Choose another one or remove it.")
    unfinished = target.with_name(target.name + ".incomplete")
    if unfinished.exists():
        raise ConfigError(f"{unfinished} is left from an interrupted run, or in use by another one. Remove it.")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.rename(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


class CheckpointWriter:
    """safetensors files and their index, named as transformers names them. Use it in a `with` block.

    Args:
        folder: where to write.
        max_shard_bytes: of tensors in one file; a larger single group gets a file of its own.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._shards: list[_Shard] = []

    def add(self, group: Mapping[str, Tensor]) -> None:
        """Append tensors, all to the same file.

        Args:
            group: by name, on any device. Names must be new.
        """
        num_bytes = sum(tensor.nbytes for tensor in group.values())
        if not self._shards or not self._shards[-1].has_room(group, num_bytes, self.max_shard_bytes):
            if self._shards:
                self._shards[-1].close()
            self._shards.append(_Shard(self.folder / f"shard-{len(self._shards)}"))
        for name, tensor in group.items():
            assert all(name not in shard.entries for shard in self._shards), f"{name} was written twice"
            self._shards[-1].append(name, tensor)
        self.total_bytes += num_bytes

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shards:
            self._shards[-1].close()
        if kind is None:
            self._name_files()

    def _name_files(self) -> None:
        count = len(self._shards)
        if count == 1:
            os.rename(self._shards[0].path, self.folder / SAFE_WEIGHTS_NAME)
            return
        stem = SAFE_WEIGHTS_NAME.removesuffix(".safetensors")
        weight_map = {}
        for number, shard in enumerate(self._shards, start=1):
            file = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
            os.rename(shard.path, self.folder / file)
            weight_map.update(dict.fromkeys(shard.entries, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


class _Shard:
    """One file that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self._waiting: list[tuple[str, Tensor]] = []
        self._num_bytes = 0  # including those of waiting tensors
        self._written = 0
        self._header_bytes = 0  # no less than the header will take
        self._file = open(path, "xb")  # noqa: SIM115  (closed by close)
        self._file.seek(8 + _HEADER_BYTES)

    def has_room(self, group: Mapping[str, Tensor], num_bytes: int, max_shard_bytes: int) -> bool:
        header = self._header_bytes + sum(map(_entry_bytes, group))
        return self._num_bytes + num_bytes <= max_shard_bytes and header <= _HEADER_BYTES

    def append(self, name: str, tensor: Tensor) -> None:
        self._num_bytes += tensor.nbytes
        self._header_bytes += _entry_bytes(name)
        self.entries[name] = {}
        if tensor.nbytes % _ALIGNMENT_BYTES:
            self._waiting.append((name, tensor.cpu()))
        else:
            self._write(name, tensor)

    def close(self) -> None:
        for name, tensor in sorted(self._waiting, key=lambda entry: -entry[1].itemsize):
            self._write(name, tensor)
        self._waiting.clear()
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")).encode()
        assert len(header) <= _HEADER_BYTES
        self._file.seek(0)
        self._file.write(_HEADER_BYTES.to_bytes(8, "little") + header.ljust(_HEADER_BYTES))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write(self, name: str, tensor: Tensor) -> None:
        start, self._written = self._written, self._written + tensor.nbytes
        self.entries[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, self._written],
        }  # fmt: skip
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _entry_bytes(name: str) -> int:
    return len(json.dumps(name)) + _ENTRY_BYTES
