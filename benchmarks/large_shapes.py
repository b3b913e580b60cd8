"""Models of 33B to 70B parameters on cards of 24 and 48 GiB: do they load, do they train, in how much memory?

    PYTHONPATH=. python3 benchmarks/large_shapes.py --shape llama-70b --ranks 2 --card-gib 24 --folder /dev/shm \\
        --vocab-size 32000 128256 --seq-len 512 2048 --replicate-head --embedding-on-host --stock

Makes a random model of that shape in bitsandbytes NF4 with double quantisation, fed tensor by tensor to the package's
own quantiser (the 16-bit model never exists), and trains LoRA on all linear layers through the stock SFTTrainer, every
sequence length in fresh processes. Quantised once, one layer's bytes stand for all layers, unless --distinct-layers.
Each rank is capped with `set_per_process_memory_fraction`, less what CUDA and NCCL take themselves (`--reserve-gib`),
so one large GPU stands in for small cards; ranks that outnumber the GPUs share one. "card" is the allocator's peak and
what the driver counts beyond it after the last step (CUDA, NCCL): whether all of it stayed within the small card, if
the rank has the GPU to itself. Ranks allocate with `PYTORCH_ALLOC_CONF=expandable_segments:True` unless
--no-expandable. Quantised bytes are checked against their fingerprints before the first step and after the last.
Random weights: losses only show that they are finite and equal on all ranks. Every figure is printed as soon as it is
known; a run that does not fit is a line of its own, and the next one begins. `--stock` shows what transformers does
with the same folder under the same cap. `--keep` names a folder for the models, to be used by the next call too.

Host memory is RssAnon + RssShmem of a rank at its highest: what the process allocated, page cache left out; "pinned"
are the pinned blocks that its parameters lie in. `--replicate-head` and `--embedding-on-host` concern vocabularies
above 100,000 only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from launch import FSDP2_ENV, run_ranks
from peak_memory import PeakMemory
from random_folders import quantize_random, write_models
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessRaisedException
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHAPES = {
    "tiny": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4),
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8),
    "llama-33b": dict(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52),
    "llama-65b": dict(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64),
    "llama-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                      num_key_value_heads=8),
}  # fmt: skip
GIB = 2**30
STEPS = 3
LARGE_VOCABULARY = 100_000
COLUMNS = ("vocabulary", "tokens", "rank", "load s", "peak loading GiB", "peak training GiB", "planner GiB",
           "reserved GiB", "card GiB", "host peak GiB", "pinned GiB", "s per step", "losses")  # fmt: skip
TABLE = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def main() -> None:
    args = parse_arguments()
    if args.expandable:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read by the processes that are started
    folder = Path(tempfile.mkdtemp(dir=args.folder)) if args.keep is None else args.keep
    try:
        models = run_ranks(write_models, folder, SHAPES[args.shape], args.vocab_size, args.distinct_layers,
                           world_size=1, process_group=False)[0]  # fmt: skip
        lines = [line for vocab, path in models.items() for line in run_model(args, vocab, path)]
    finally:
        if args.keep is None:
            shutil.rmtree(folder)
    say(
        f"\n{args.shape}, {args.ranks} rank(s) of {args.card_gib:g} GiB ({args.reserve_gib:g} GiB kept for CUDA and "
        f"NCCL), batch {args.batch_size}, LoRA r={args.lora_r} {args.adapter_dtype}, {args.optim}, offload "
        f"{args.offload}, layers {'distinct' if args.distinct_layers else 'alike'}, expandable segments "
        f"{'on' if args.expandable else 'off'}\n{TABLE}"
    )
    say("\n".join(lines))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[32000])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--card-gib", type=float, default=24.0, help="memory of the card that is stood in for")
    parser.add_argument("--reserve-gib", type=float, default=1.6, help="of which CUDA and NCCL take this much")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--adapter-dtype", default="float32")
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--offload", choices=["none", "base", "all"], default="none")
    parser.add_argument("--replicate-head", action="store_true", help="large vocabularies: a whole head per rank")
    parser.add_argument("--embedding-on-host", action="store_true", help="large vocabularies: look up on the host")
    parser.add_argument("--activation-offloading", action="store_true", help="TRL's: activations in host memory")
    parser.add_argument("--distinct-layers", action="store_true", help="quantise every layer from values of its own")
    parser.add_argument("--stock", action="store_true", help="load each folder with transformers first")
    parser.add_argument("--expandable", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", help="where the model is written for the time of the run")
    parser.add_argument("--keep", type=Path, help="a folder to leave the model in; one that is there is used")
    return parser.parse_args()


def write_model(folder: Path, shape: str, vocab_size: int) -> None:
    """The quantised folder `folder/nf4`, from random tensors made on the device one at a time."""
    quantize_random(folder, "nf4", SHAPES[shape], vocab_size)


def run_model(args: argparse.Namespace, vocab_size: int, path: Path) -> list[str]:
    """All runs of one folder, as lines of the table."""
    env = FSDP2_ENV | {"FSDP_OFFLOAD_PARAMS": str(args.offload == "all").lower()}
    is_large = vocab_size > LARGE_VOCABULARY
    options = {"replicate_head": is_large and args.replicate_head,
               "embedding_on_host": is_large and args.embedding_on_host}  # fmt: skip
    distributed = args.ranks > 1 or args.offload != "none" or any(options.values())
    launch: dict[str, Any] = dict(world_size=args.ranks, env=env if distributed else None, process_group=distributed)
    if args.stock:
        say(f"\nvocabulary {vocab_size}: stock transformers, the same folder under the same cap")
        run_ranks(load_stock, str(path), vars(args), **launch)
    lines = []
    for seq_len in args.seq_len:
        planned = planned_bytes(args, path, seq_len, options, distributed) / GIB
        say(f"\nvocabulary {vocab_size}, {seq_len} tokens, {options}: planner {planned:.2f} GiB")
        started = time.perf_counter()
        try:
            results = run_ranks(train, str(path), vars(args) | {"seq_len": seq_len}, options, **launch)
        except ProcessRaisedException as error:
            reason = str(error).strip().splitlines()[-1]
            say(f"failed after {time.perf_counter() - started:.0f} s: {reason}")
            lines.append(f"| {vocab_size} | {seq_len} | failed: {reason[:200]} |" + " |" * (len(COLUMNS) - 3))
            continue
        say(f"{time.perf_counter() - started:.0f} s in all")
        lines += [row(vocab_size, seq_len, rank, planned, result) for rank, result in enumerate(results)]
        say("\n".join([TABLE, *lines[-len(results) :]]))
        host, pinned = (sum(result[name] for result in results) for name in ("host", "pinned"))
        say(f"all ranks: {host:.2f} GiB of host memory at most, {pinned:.2f} GiB pinned for parameters")
        check(results)
    return lines


def planned_bytes(
    args: argparse.Namespace, path: Path, seq_len: int, options: dict[str, bool], distributed: bool
) -> int:
    """The planner's peak."""
    from hf_fsdp_qlora.memory import estimate_memory
    from hf_fsdp_qlora.model_shape import model_shape

    settings: dict[str, Any] = dict(
        engine="fsdp2" if distributed else "none", gpus=args.ranks, offload=args.offload, seq_len=seq_len,
        batch_size=args.batch_size, lora_r=args.lora_r, adapter_dtype=args.adapter_dtype, optimizer=args.optim,
        prequantized=True, activation_offloading=args.activation_offloading, **options,
    )  # fmt: skip
    return estimate_memory(model_shape(path), **settings).peak_bytes


def cap(args: dict[str, Any]) -> bool:
    """Limit this rank's allocator to the small card. Returns whether there is a GPU."""
    if not torch.cuda.is_available():
        return False
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (args["card_gib"] - args["reserve_gib"]) * GIB / total))
    return True


def load_stock(model_path: str, args: dict[str, Any]) -> None:
    """One rank: what the stock stack does before it can shard, load the whole quantised model onto its card."""
    from transformers import AutoModelForCausalLM

    cuda = cap(args)
    started = time.perf_counter()
    place = {"": torch.cuda.current_device() if cuda else "cpu"}
    try:
        AutoModelForCausalLM.from_pretrained(model_path, device_map=place, dtype=torch.bfloat16)
    except torch.OutOfMemoryError as error:
        outcome = f"torch.OutOfMemoryError: {str(error).splitlines()[0][:150]}"
    else:
        outcome = "loaded"
    rank_says(f"stock after {time.perf_counter() - started:.1f} s, peak {gpu_gib()['peak']:.2f} GiB: {outcome}")


class Steps(TrainerCallback):
    """Prints each step's time and the peak so far."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started)
        gib = gpu_gib()
        rank_says(f"step {state.global_step}: {self.seconds[-1]:.2f} s, peak {gib['peak']:.2f} GiB, "
                  f"reserved {gib['reserved']:.2f}")  # fmt: skip


def train(model_path: str, args: dict[str, Any], options: dict[str, bool]) -> dict[str, Any]:
    """One rank: load under the cap, train, and say what it took."""
    from peft import LoraConfig

    from hf_fsdp_qlora import load_model
    from hf_fsdp_qlora.integrity import check_integrity

    cuda = cap(args)
    with PeakMemory("RssAnon", "RssShmem") as host:
        model = load_model(
            model_path,
            peft_config=LoraConfig(r=args["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM"),
            offload=args["offload"] if args["offload"] != "none" else None,
            adapter_dtype=getattr(torch, args["adapter_dtype"]),
            **options,  # type: ignore[arg-type]
        )
        loaded = gpu_gib() | {"load_s": model.load_report.seconds}
        rank_says(f"loaded in {loaded['load_s']:.1f} s: GPU peak {loaded['peak']:.2f} GiB, host peak "
                  f"{host.peak_bytes / GIB:.2f} GiB. {model.load_report.summary()}")  # fmt: skip
        steps = Steps()
        trainer = make_trainer(model, f"{model_path}-out", args, steps)
        rows_checked = check_integrity(model)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        trained = gpu_gib()
        check_integrity(model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rank_says(f"trained; {rows_checked} rows byte-equal before and after")
    return {"loaded": loaded, "trained": trained, "host": host.peak_bytes / GIB, "pinned": pinned_bytes(model) / GIB,
            "seconds": steps.seconds, "losses": losses}  # fmt: skip


def pinned_bytes(model: torch.nn.Module) -> int:
    """Of the pinned blocks of host memory that the parameters' local shards lie in."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    storages = [shard.untyped_storage() for shard in local if shard.device.type == "cpu" and shard.is_pinned()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def make_trainer(model: Any, output_dir: str, args: dict[str, Any], steps: Steps) -> Any:
    """The stock SFTTrainer over random tokens, equal on all ranks."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.tiny_tokenizer import make_tokenizer

    cuda = torch.cuda.is_available()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 259, (STEPS * args["batch_size"] * 4, args["seq_len"]), generator=generator)
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=output_dir, per_device_train_batch_size=args["batch_size"], max_steps=STEPS,
            max_length=args["seq_len"], optim=args["optim"], learning_rate=1e-4, gradient_checkpointing=True,
            activation_offloading=args["activation_offloading"], bf16=cuda, use_cpu=not cuda, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=make_tokenizer(),
        callbacks=[steps],
    )  # fmt: skip


def gpu_gib() -> dict[str, float]:
    """Peaks of tensors, of the allocator's reservation, and of that with what the card holds beside it."""
    if not torch.cuda.is_available():
        return {"peak": 0.0, "reserved": 0.0, "card": 0.0}
    free, total = torch.cuda.mem_get_info()
    peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    beside = (total - free - torch.cuda.memory_reserved()) / GIB
    return {"peak": peak, "reserved": reserved, "card": reserved + beside}


def row(vocab_size: int, seq_len: int, rank: int, planned: float, result: dict[str, Any]) -> str:
    loaded, trained, later = result["loaded"], result["trained"], result["seconds"][1:]
    return (
        f"| {vocab_size} | {seq_len} | {rank} | {loaded['load_s']:.1f} | {loaded['peak']:.2f} | {trained['peak']:.2f} "
        f"| {planned:.2f} | {trained['reserved']:.2f} | {trained['card']:.2f} | {result['host']:.2f} | "
        f"{result['pinned']:.2f} | {sum(later) / len(later):.2f} | "
        f"{', '.join(f'{loss:.4f}' for loss in result['losses'])} |"
    )


def check(results: list[dict[str, Any]]) -> None:
    """That the ranks agree and the losses are numbers."""
    assert all(result["losses"] == results[0]["losses"] for result in results), "ranks disagree about the loss"
    assert all(torch.isfinite(torch.tensor(result["losses"])).all() for result in results), "losses are not finite"


def rank_says(text: str) -> None:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    say(f"  rank {rank}: {text}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
