"""How fast a 16-bit checkpoint becomes quantised weights on one device, beside stock transformers.

    python3 benchmarks/loading_speed.py --shape llama-8b --folder /dev/shm --repeats 2 [--ranks 1 2] [--cold]

Writes a random bf16 model and loads it with both stacks: NF4 with double quantisation, with and without LoRA.
Each load is timed from the call to a synchronised device, in a process in which a small model was loaded before, so
that starting CUDA is in no figure. Some weights of the two must be bit-identical before a time is printed.

"stream" reads the same bytes to the device and drops them: no load can be faster. `--threads` tries numbers of reader
threads for it. `--cold` drops the files from the page cache before a load, and says how fast the disk is read by as
many threads that do nothing else; it needs a folder on a disk. `--ranks` loads in so many new processes too, under
FSDP2 from two on (a GPU each where there are as many), warmed up by the small model as well: the slowest rank's time,
and the bytes that all ranks together asked the files for, which must be the checkpoint's.

Phases are seconds inside the functions that `load_model` calls; "fill" is reading, quantising and storing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from large_shapes import SHAPES
from launch import FSDP2_ENV, describe_machine, run_ranks
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from hf_fsdp_qlora import QuantizedLinear, checkpoint, load_model, loading
from hf_fsdp_qlora.adapter_source import AdapterSource
from hf_fsdp_qlora.checkpoint import TensorSlice, index_checkpoint, stream_slices
from hf_fsdp_qlora.safetensors_stream import SafetensorsWriter, TensorInfo

FILE_BYTES = 4 * 2**30
PHASES: dict[str, Any] = {
    **dict.fromkeys(
        ("build_skeleton", "replace_linears", "index_checkpoint", "match_checkpoint", "_shard_and_allocate", "fill",
         "check_integrity", "attach", "make_report"), loading),
    **dict.fromkeys(("AdapterSource.inject", "AdapterSource.fill"), AdapterSource),
}  # fmt: skip
"""Where each function is looked up."""

COMPARED = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
LOADS = ("stock", "ours", "ours with LoRA")
CUDA = torch.cuda.is_available()


def main() -> None:
    args = parse_arguments()
    device = torch.device("cuda", 0) if CUDA else torch.device("cpu")
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
        num_bytes = write_checkpoint(folder / "model", shape, args.vocab_size)
        write_checkpoint(folder / "small", SHAPES["tiny"], 256)
        load_ours(folder / "small", None)
        load_stock(folder / "small")
        print(describe_machine())
        print(f"{args.shape}, {shape['num_hidden_layers']} layers, {num_bytes / 1e9:.2f} GB of bf16", flush=True)
        compare(folder / "model")
        print("| what | s | GB/s |")
        print("| --- | --- | --- |")
        for threads in args.threads:
            timed(f"stream, {threads} threads", lambda n=threads: stream(folder / "model", device, n), num_bytes)
        loads: dict[str, Callable[[], Any]] = {
            "stock": lambda: load_stock(folder / "model"),
            "ours": lambda: load_ours(folder / "model", None),
            "ours with LoRA": lambda: load_ours(folder / "model", LoraConfig(r=16, target_modules="all-linear")),
        }
        for name in args.loads:
            for _ in range(args.repeats):
                with phases() as seconds:
                    timed(name, loads[name], num_bytes)
                if seconds:
                    print(phase_row(seconds))
        for ranks in args.ranks:
            load_in_ranks(folder, ranks, args.repeats, num_bytes, "")
        if args.cold:
            files = sorted((folder / "model").glob("*.safetensors"))
            evict(files)
            timed("disk alone", lambda: read_only(files), num_bytes)
            for name in args.loads:
                evict(files)
                timed(f"{name}, cold", loads[name], num_bytes)
            for ranks in args.ranks:
                evict(files)
                load_in_ranks(folder, ranks, 1, num_bytes, ", cold")
    finally:
        shutil.rmtree(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--ranks", type=int, nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="*", default=[checkpoint.READER_THREADS])
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--folder", help="where the checkpoint is written for the time of the run")
    return parser.parse_args()


def timed(name: str, action: Callable[[], Any], num_bytes: int) -> None:
    """Run once, print a row, and free what it made."""
    started = time.perf_counter()
    made = action()
    if CUDA:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    del made
    gc.collect()
    print(f"| {name} | {seconds:.3f} | {num_bytes / seconds / 1e9:.1f} |", flush=True)


def load_in_ranks(folder: Path, ranks: int, repeats: int, num_bytes: int, suffix: str) -> None:
    """Load in new processes and print a row for each time.

    Raises:
        RuntimeError: the ranks did not ask for each byte of the checkpoint once.
    """
    results = run_ranks(
        time_loads, folder, repeats, world_size=ranks, env=FSDP2_ENV if ranks > 1 else None, process_group=ranks > 1
    )
    for loads in zip(*results, strict=True):
        seconds, read = max(load[0] for load in loads), sum(load[1] for load in loads)
        if read != num_bytes:
            raise RuntimeError(f"{ranks} rank(s) read {read} bytes of a checkpoint of {num_bytes}")
        each = ", ".join(f"{load[1] / 1e9:.3f}" for load in loads)
        print(
            f"| ours, {ranks} rank(s){suffix}; GB read by each: {each} | {seconds:.3f} | "
            f"{num_bytes / seconds / 1e9:.1f} |\n{phase_row(loads[0][2])}",
            flush=True,
        )


def time_loads(folder: Path, repeats: int) -> list[tuple[float, int, dict[str, float]]]:
    """One rank: seconds until its GPU has its share, the bytes it read, and the seconds of phases, for every load."""
    load_ours(folder / "small", None)
    results = []
    for _ in range(repeats):
        if dist.is_initialized():
            dist.barrier()
        started = time.perf_counter()
        with phases() as seconds:
            model: Any = load_ours(folder / "model", None)
        if CUDA:
            torch.cuda.synchronize()
        results.append((time.perf_counter() - started, model.load_report.read_bytes, seconds))
        del model
        gc.collect()
    return results


@contextmanager
def phases() -> Iterator[dict[str, float]]:
    """Seconds inside each function of `PHASES` while the block runs."""
    seconds: dict[str, float] = {}

    def watched(phase: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started

        return call

    with ExitStack() as stack:
        for phase, owner in PHASES.items():
            name = phase.rpartition(".")[2]
            stack.enter_context(mock.patch.object(owner, name, watched(phase, getattr(owner, name))))
        yield seconds


def phase_row(seconds: dict[str, float]) -> str:
    return "|   " + ", ".join(f"{phase} {value:.3f}" for phase, value in seconds.items()) + " | | |"


def load_stock(folder: Path) -> nn.Module:
    device_map = {"": 0 if CUDA else "cpu"}
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bits(), dtype=torch.bfloat16, device_map=device_map
    )


def load_ours(folder: Path, peft_config: LoraConfig | None) -> nn.Module:
    return load_model(folder, quantization_config=four_bits(), dtype=torch.bfloat16, peft_config=peft_config)


def four_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def compare(folder: Path) -> None:
    """The same weights, bit for bit, in both models."""
    from bitsandbytes import functional as bnb

    ours, stock = load_ours(folder, None), load_stock(folder)
    for name in COMPARED:
        mine: Any = ours.get_submodule(name)
        theirs: Any = stock.get_submodule(name).weight
        assert isinstance(mine, QuantizedLinear)
        expected = bnb.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(mine.dequantize(), expected.view(mine.out_features, -1)), name
    print(f"{', '.join(COMPARED)}: bit-identical to stock")


def stream(folder: Path, device: torch.device, threads: int) -> None:
    """Read everything to the device in the order of the files, and drop it."""
    usual, checkpoint.READER_THREADS = checkpoint.READER_THREADS, threads
    try:
        tensors = sorted(
            index_checkpoint(sorted(folder.glob("*.safetensors"))).values(), key=lambda t: (str(t.path), t.offset)
        )
        for _ in stream_slices([TensorSlice(tensor, 0, tensor.numel) for tensor in tensors], device):
            pass
    finally:
        checkpoint.READER_THREADS = usual


def evict(files: list[Path]) -> None:
    """Drop the files from the page cache; they must be on the disk first."""
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_only(files: list[Path]) -> None:
    """Read the files in pieces, with as many threads as the loader has, into buffers that are used again."""
    step = checkpoint.PIECE_BYTES
    pieces = [(path, at) for path in files for at in range(0, path.stat().st_size, step)]

    def read(path: Path, at: int) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            file.readinto(bytearray(step))

    with ThreadPoolExecutor(checkpoint.READER_THREADS) as pool:
        list(pool.map(lambda piece: read(*piece), pieces))


def write_checkpoint(folder: Path, shape: dict[str, int], vocab_size: int) -> int:
    """A random bf16 Llama in files of about 4 GiB; returns its bytes."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=vocab_size, max_position_embeddings=4096, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        **shape,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    files: list[dict[str, TensorInfo]] = [{}]
    for name, tensor in model.state_dict().items():
        info = TensorInfo(torch.bfloat16, tuple(tensor.shape))
        if sum(other.num_bytes for other in files[-1].values()) + info.num_bytes > FILE_BYTES:
            files.append({})
        files[-1][name] = info
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    weight_map = {}
    for number, content in enumerate(files, start=1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with SafetensorsWriter(folder / file_name, content, {"format": "pt"}) as writer:
            for name, info in content.items():
                values = torch.empty(info.shape, dtype=info.dtype, device=device).normal_(0, 0.02)
                writer.append(values.cpu())
                weight_map[name] = file_name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(info.num_bytes for content in files for info in content.values())


if __name__ == "__main__":
    main()
