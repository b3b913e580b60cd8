"""Which file and byte range holds which weights, and reading just those bytes.

safetensors stores a tensor as one contiguous run of row-major bytes, so the weights a rank owns are a byte range of a
file. The header is read here, because the library does not tell offsets; the format is eight bytes of length and JSON.

Slices are read ahead by a few threads while the caller works on the ones before: on the CPU straight into the result,
on a GPU through one pinned staging buffer and one stream per thread. Nothing is memory-mapped, so what has been read
counts against the page cache and not against the process.

Left out: pickle checkpoints, which run code and cannot be sliced.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from hf_fsdp_qlora.errors import ConfigError

READER_THREADS = 8
PIECE_BYTES = 16 * 2**20
LOOKAHEAD_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 100 * 2**20
"""The limit that the safetensors library itself sets."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Args:
        path: the safetensors file.
        offset: bytes from the start of the file to the first element.
        dtype: the dtype in the file.
        shape: the shape in the file; row-major, contiguous.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class TensorSlice:
    """Elements `start` to `stop` of the flattened tensor."""

    tensor: StoredTensor
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return (self.stop - self.start) * self.tensor.dtype.itemsize


def find_checkpoint(model_name_or_path: str, **hub_kwargs: Any) -> list[Path]:
    """The safetensors files of a local folder or of a model on the hub, downloaded if needed.

    Args:
        hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder`, ..., as `from_pretrained` takes them.

    Raises:
        ConfigError: there is no safetensors checkpoint.
        OSError: transformers' own error for a model that cannot be found or reached.
    """
    single, index = (
        cached_file(model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if single is not None:  # first, as in transformers: a folder may hold an older sharded copy too
        return [Path(single)]
    if index is not None:
        files, _ = get_checkpoint_shard_files(model_name_or_path, index, **hub_kwargs)
        return [Path(file) for file in files]
    raise ConfigError(
        f"{model_name_or_path} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}. Only safetensors can be "
        "read slice by slice; convert a pickle checkpoint (pytorch_model.bin) once with "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)."
    )


def index_checkpoint(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the files' headers alone.

    Raises:
        ConfigError: a file is truncated, is no safetensors file, or has a dtype that torch lacks.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(read_header(file))
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises as `index_checkpoint` does.

    Source: https://github.com/huggingface/safetensors#format
    """
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ConfigError(
                f"{path} ({file_bytes} bytes) is not a whole safetensors file: truncated, or a git-lfs pointer. "
                "Download it again."
            )
        header = json.loads(file.read(header_bytes))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        if end > file_bytes:
            raise ConfigError(f"{path} is truncated: {name} ends at byte {end} of {file_bytes}. Download it again.")
        if entry["dtype"] not in DTYPES:
            raise ConfigError(f"{path}: {name} has dtype {entry['dtype']}, which cannot be read here.")
        tensors[name] = StoredTensor(path, begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return tensors


def stream_slices(slices: Sequence[TensorSlice], device: torch.device) -> Iterator[Tensor]:
    """Read slices in the order given, some way ahead of the caller.

    Args:
        slices: what to read. Neighbours in a file should be neighbours here.
        device: where the result goes, a CPU or CUDA device.

    Yields:
        One 1-D tensor per slice, in the dtype of the file. At most `LOOKAHEAD_BYTES` plus one slice wait at a time.

    Raises:
        OSError: a file cannot be read, or became shorter.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # reader threads have a current device of their own
    reader = _Reader(device)
    waiting: deque[tuple[TensorSlice, Tensor, list[Future[None]]]] = deque()
    waiting_bytes = 0
    remaining = iter(slices)
    upcoming = next(remaining, None)
    try:
        while upcoming is not None or waiting:
            while upcoming is not None and (not waiting or waiting_bytes + upcoming.num_bytes <= LOOKAHEAD_BYTES):
                waiting.append((upcoming, *reader.start(upcoming)))
                waiting_bytes += upcoming.num_bytes
                upcoming = next(remaining, None)
            current, data, pieces = waiting.popleft()
            waiting_bytes -= current.num_bytes
            for piece in pieces:
                piece.result()
            yield data.view(current.tensor.dtype)
            del data
    finally:
        reader.close()


class _Staging(threading.local):
    """One thread's pinned buffer and stream, made when it first reads for a GPU."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            self.stream = torch.cuda.Stream(device)


class _Reader:
    """Threads that fill tensors from files."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="checkpoint-reader")
        self.files: dict[Path, int] = {}
        self.staging = _Staging(device)

    def start(self, piece_of: TensorSlice) -> tuple[Tensor, list[Future[None]]]:
        """Begin to read a slice; the tensor is complete once every future is done."""
        data = _buffer(piece_of.num_bytes, self.device)
        allocated = None
        if self.device.type == "cuda":  # the block may still be read by kernels queued before it was freed
            allocated = torch.cuda.Event()
            allocated.record()
        file = self._open(piece_of.tensor.path)
        begin = piece_of.tensor.offset + piece_of.start * piece_of.tensor.dtype.itemsize
        pieces = [
            self.pool.submit(self._read, file, begin + at, data[at : at + PIECE_BYTES], allocated)
            for at in range(0, piece_of.num_bytes, PIECE_BYTES)
        ]
        return data, pieces

    def close(self) -> None:
        """Stop the threads and close the files."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        for file in self.files.values():
            os.close(file)

    def _open(self, path: Path) -> int:
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY)
        return self.files[path]

    def _read(self, file: int, offset: int, target: Tensor, allocated: torch.cuda.Event | None) -> None:
        if allocated is None:
            _read_exactly(file, offset, target)
            return
        staging = self.staging
        staged = staging.buffer[: target.numel()]
        _read_exactly(file, offset, staged)
        with torch.cuda.stream(staging.stream):
            allocated.wait()
            target.copy_(staged, non_blocking=True)
        staging.stream.synchronize()


def _buffer(num_bytes: int, device: torch.device) -> Tensor:
    """An uninitialised byte tensor. On the CPU from pages of its own: in the heap, buffers of many sizes leave holes
    that the process keeps."""
    if device.type == "cpu" and num_bytes:
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _read_exactly(file: int, offset: int, target: Tensor) -> None:
    """Fill a contiguous uint8 CPU tensor from a file position."""
    memory = memoryview(target.numpy().data)
    done = 0
    while done < len(memory):
        got = os.preadv(file, [memory[done:]], offset + done)
        if got == 0:
            raise OSError(f"unexpected end of file at byte {offset + done}; the checkpoint changed while it was read")
        done += got
