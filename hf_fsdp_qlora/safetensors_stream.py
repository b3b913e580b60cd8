"""Read and write safetensors files one tensor at a time, with ordinary file reads.

Rewriting a checkpoint needs two things the safetensors library does not offer: a writer that never holds more than
one tensor (its `save_file` takes the whole shard), and a reader whose memory use does not depend on how much of a
memory map the kernel keeps in the process. The format is small: eight bytes of header length, a JSON header with
dtype, shape and byte range of every tensor, then the bytes back to back.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open

from hf_fsdp_qlora.checkpoint import DTYPES, read_header
from hf_fsdp_qlora.errors import ConfigError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY_BYTES = 2**24
_HEADER_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its torch dtype, its shape, and where its bytes start in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsReader:
    """The tensors of one file, in the order of their bytes.

    Args:
        path: the file.

    Raises:
        ConfigError: as `checkpoint.read_header`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = sorted(read_header(path).items(), key=lambda item: item[1].offset)
        self.tensors = {name: TensorInfo(tensor.dtype, tensor.shape, tensor.offset) for name, tensor in stored}
        with safe_open(path, "pt") as file:
            self.metadata: dict[str, str] | None = file.metadata()
        self._file = open(path, "rb")  # noqa: SIM115  (closed by __exit__)

    def read(self, name: str) -> torch.Tensor:
        """A fresh CPU tensor with that name's contents."""
        info = self.tensors[name]
        buffer = torch.empty(info.num_bytes, dtype=torch.uint8)
        self._file.seek(info.start)
        if self._file.readinto(buffer.numpy().data) != info.num_bytes:
            raise ConfigError(f"{self.path} became shorter while it was read: {name} is cut off.")
        return buffer.view(info.dtype).reshape(info.shape)

    def copy_bytes(self, name: str, target: SafetensorsWriter) -> None:
        """Append that tensor's bytes to `target` in small pieces, without looking at them."""
        info = self.tensors[name]
        self._file.seek(info.start)
        left = info.num_bytes
        while left:
            piece = self._file.read(min(left, _COPY_BYTES))
            if not piece:
                raise ConfigError(f"{self.path} became shorter while it was read: {name} is cut off.")
            target.append_bytes(piece)
            left -= len(piece)

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class SafetensorsWriter:
    """Write one file front to back: the header first, then every tensor in the order of the header.

    Args:
        path: the file to create.
        tensors: dtype and shape of every tensor, in the order in which they will be appended.
        metadata: the header's `__metadata__`, or None.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str] | None) -> None:
        header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for name, info in tensors.items():
            start, end = end, end + info.num_bytes
            header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
        self.path = path
        self._left = end
        self._file = open(path, "xb")  # noqa: SIM115  (closed by __exit__)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def append(self, tensor: torch.Tensor) -> None:
        """Append the next tensor of the header."""
        self.append_bytes(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def append_bytes(self, data: bytes | memoryview) -> None:
        """Append raw bytes of the next tensor."""
        self._left -= len(data)
        self._file.write(data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._left == 0, f"{self.path}: {self._left} bytes of the header's tensors were not written"
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
