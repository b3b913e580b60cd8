"""Bytes that FSDP2 sends per step, counted; and what adapters, prefetching and overlap have to do with the time.

    PYTHONPATH=. python3 benchmarks/communication.py --shape llama-8b --layers 8 --trace trace.json.gz

Two ranks train LoRA r=16 on a random NF4 model (all layers alike) through the stock SFTTrainer, in three variants:

  shipped      as `load_model` makes it
  prefetch     rows are asked for one decoder layer ahead (FSDP2's public `set_modules_to_..._prefetch`)
  replicated   adapters and norms whole on every rank, gradients summed once at the end of backward: an experiment of
               this file, to see what gathering adapters layer by layer costs

In one step every collective is seen in torch's dispatcher, and the bytes that were gathered are compared with what
the parameters' shapes demand: packed rows, adapters and norms once for forward and once more for backward, all else
once. The exit status is 1 if a kind is not exactly that. Other steps are timed. With `--trace` one more step runs
under the profiler, which says how much of the all-gathers' time the GPU computed (NCCL only); each variant's trace of
rank 0 is kept under the given name with the variant's put in front.

Ranks that share a GPU talk through sockets (1.8 GB/s): bytes are the same there, times are not those of NVLink.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from large_shapes import SHAPES
from launch import FSDP2_ENV, describe_machine, run_ranks
from random_folders import write_folders
from torch import Tensor, nn
from trace_overlap import overlap, read_trace
from transformers import TrainerCallback

from hf_fsdp_qlora import QuantizedLinear, load_model, sharding
from hf_fsdp_qlora.skeleton import decoder_layers
from tests.collectives import CollectiveLog, expected_bytes
from tests.tiny_tokenizer import make_tokenizer

VARIANTS = ("shipped", "prefetch", "replicated")
KINDS = ("rows", "adapters", "other")
COUNTED_STEP = 1
WARM_STEPS = 3
GIB = 2**30
LOSS_LIMIT = 5e-3
"""Relative. Gradients are summed in another order, and adapters are cast in another place: rounding of bf16."""


def main() -> int:
    """Measure every variant. Returns the exit status."""
    args = parse_arguments()
    shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        started = time.perf_counter()
        model_path = write_folders(folder, shape, [args.vocab_size])[args.vocab_size]
        print(f"{describe_machine()}\nmodel written in {time.perf_counter() - started:.0f} s", flush=True)
        results = run_ranks(measure, str(model_path), vars(args), world_size=2, env=FSDP2_ENV)[0]
    finally:
        shutil.rmtree(folder)
    print(
        f"\n{args.shape}, {shape['num_hidden_layers']} layers, vocabulary {args.vocab_size}, sequence "
        f"{args.seq_len}, batch {args.batch_size} per rank, LoRA r=16; MiB gathered per step and rank\n"
        "| variant | packed rows | expected | adapters | expected | other | expected | ratio | all-gathers | "
        "reduce-scattered | all-reduced | s per step | peak GiB | all-gathers |\n" + "| --- " * 14 + "|"
    )
    failed = False
    for result in results:
        gathered, expected = result["gathered"], result["expected"]
        failed |= any(gathered[kind] != expected[kind] for kind in KINDS)
        failed |= any(abs(a / b - 1) > LOSS_LIMIT for a, b in zip(result["losses"], results[0]["losses"], strict=True))
        print(f"| {result['variant']} | {row(result)} |")
    print("FAILED: bytes are not as expected, or the losses differ" if failed else "bytes as expected, losses agree")
    return int(failed)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--trace", help="file name, .json or .json.gz")
    parser.add_argument("--folder", help="where the model is written for the time of the run")
    return parser.parse_args()


def row(result: dict[str, Any]) -> str:
    """The cells of one variant."""
    gathered, expected = result["gathered"], result["expected"]
    cells = [f"{counts[kind] / 2**20:.2f}" for kind in KINDS for counts in (gathered, expected)]
    sums = {name: sum(size for op, (_, size) in result["others"].items() if name in op)
            for name in ("reduce_scatter", "allreduce", "all_reduce")}  # fmt: skip
    return " | ".join([
        *cells, f"{gathered.total() / expected.total():.4f}", str(result["num_gathers"]),
        f"{sums['reduce_scatter'] / 2**20:.2f}", f"{(sums['allreduce'] + sums['all_reduce']) / 2**20:.2f}",
        f"{statistics.median(result['seconds']):.3f}", f"{result['peak_gib']:.2f}", result["overlap"],
    ])  # fmt: skip


def measure(model_path: str, args: dict[str, Any]) -> list[dict[str, Any]]:
    """Every variant on this rank, one after another."""
    results = []
    for variant in args["variants"]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        results.append(run(variant, model_path, args))
        gc.collect()  # models and trainers are cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            print(f"{variant}: {row(results[-1])}; others {results[-1]['others']}", flush=True)
    return results


def run(variant: str, model_path: str, args: dict[str, Any]) -> dict[str, Any]:
    """Load, count one step, time some, trace one."""
    from peft import LoraConfig

    with whole_adapters() if variant == "replicated" else _nothing():
        model: Any = load_model(
            model_path, peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    layers = list(decoder_layers(model.get_base_model()))
    if variant == "prefetch":
        prefetch_rows(layers)
    if variant == "replicated":
        sum_gradients_at_the_end(model)
    log = CollectiveLog(model)
    expected = expected_bytes(model, layers, torch.bfloat16.itemsize)
    trace = Path(args["trace"]) if args["trace"] else None
    watch = Watch(log, args["steps"], trace and trace.with_name(f"{variant}-{trace.name}"))
    losses = train(model, watch, f"{model_path}-{variant}", args)
    return {
        "variant": variant, "gathered": log.gathered(), "expected": expected, "others": log.others(),
        "num_gathers": log.times_gathered().total(), "losses": losses, "seconds": watch.seconds,
        "peak_gib": watch.peak_gib, "overlap": watch.overlap,
    }  # fmt: skip


@contextmanager
def whole_adapters() -> Iterator[None]:
    """Let FSDP2 leave alone what `load_model` would put in the decoder layers' second group."""
    shard = sharding.fully_shard

    def without_adapters(module: Any, *, ignored_params: Any = (), **settings: Any) -> Any:
        parts = module if isinstance(module, list) else [module]
        small = {p for part in parts for p in part.parameters() if p.requires_grad or p.dim() == 1}
        return shard(module, ignored_params=small | {*ignored_params}, **settings)

    sharding.fully_shard = without_adapters  # type: ignore[assignment]
    try:
        yield
    finally:
        sharding.fully_shard = shard


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def sum_gradients_at_the_end(model: nn.Module) -> None:
    """Average the gradients of all adapters in one collective, when backward has made the last of them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ready: Counter[str] = Counter()

    def count(_: Tensor) -> None:
        ready["gradients"] += 1
        if ready["gradients"] % len(trained) == 0:
            gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
            flat = torch.cat([gradient.view(-1) for gradient in gradients]) / dist.get_world_size()
            dist.all_reduce(flat)
            pieces = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_([gradient.view(-1) for gradient in gradients], list(pieces))

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(count)


def prefetch_rows(layers: list[nn.Module]) -> None:
    """Gather the rows and adapters of the next layer while one is computed, in forward and in backward."""
    rows: list[Any] = [next(part for part in layer.modules() if isinstance(part, QuantizedLinear)) for layer in layers]
    groups: list[list[Any]] = [[layer, first] for layer, first in zip(layers, rows, strict=True)]
    for index, first in enumerate(rows):
        if index + 1 < len(rows):
            first.set_modules_to_forward_prefetch(groups[index + 1])
        if index > 0:
            first.set_modules_to_backward_prefetch(groups[index - 1])


class Watch(TrainerCallback):
    """One step counted, some timed, and one traced."""

    def __init__(self, log: CollectiveLog, steps: int, trace: Path | None) -> None:
        self.log, self.trace = log, trace
        self.traced_step = WARM_STEPS + steps
        self.seconds: list[float] = []
        self.peak_gib = 0.0
        self.overlap = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == COUNTED_STEP:
            self.log.__enter__()
        if state.global_step == WARM_STEPS and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if state.global_step == self.traced_step:
            self.profiler = torch.profiler.profile()
            self.profiler.__enter__()
        _synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _synchronize()
        step = state.global_step - 1
        if step == COUNTED_STEP:
            self.log.__exit__(None, None, None)
        if WARM_STEPS <= step < self.traced_step:
            self.seconds.append(time.perf_counter() - self.started)
            if torch.cuda.is_available():
                self.peak_gib = torch.cuda.max_memory_allocated() / GIB
        if step == self.traced_step:
            self.profiler.__exit__(None, None, None)
            if dist.get_rank() == 0:
                self.profiler.export_chrome_trace(str(self.trace))
                self.overlap = str(overlap(read_trace(str(self.trace))))


def train(model: nn.Module, watch: Watch, output_dir: str, args: dict[str, Any]) -> list[float]:
    """Losses of every step."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    steps = watch.traced_step + int(args["trace"] is not None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 259, (2 * steps * args["batch_size"], args["seq_len"]), generator=generator)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=output_dir, per_device_train_batch_size=args["batch_size"], max_steps=steps,
            max_length=args["seq_len"], learning_rate=1e-4, gradient_checkpointing=True, bf16=cuda, use_cpu=not cuda,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=make_tokenizer(),
        callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
