"""How cost grows with the size of the model and the number of ranks: loading, host and GPU memory, steps.

    PYTHONPATH=. python3 benchmarks/growth.py --shapes 1b 3b 8b --ranks 1 2 --results growth.jsonl --folder /dev/shm
    PYTHONPATH=. python3 benchmarks/growth.py --shapes --results growth.jsonl --plot docs/growth.svg

For every shape a random NF4 folder (all layers alike) is written once; then each number of ranks, in fresh processes,
loads it and takes a few steps of LoRA r=16 through the stock SFTTrainer, FSDP2 from two ranks on. Rows are printed and
appended to the results as they come. Rows that the file has for this device and these settings are not measured again,
so a second call goes on; without shapes, only the table and the plot are made. Ranks that outnumber the GPUs share one
and talk through sockets: their steps are slower than those of two GPUs, and the table says how many GPUs there were.

Beside a GPU all processes start at once, do their imports, and wait for their turn. Host memory is private and shared
memory that a rank allocates while it loads, above what it had before (the CUDA context and NCCL included there).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import statistics
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from growth_results import HEADER, SETTINGS, line, plot, read
from large_shapes import SHAPES
from launch import FSDP2_ENV, describe_machine, run_ranks
from peak_memory import PeakMemory
from random_folders import write_folders
from torch.multiprocessing.spawn import ProcessException
from transformers import TrainerCallback

GROWTH_SHAPES = {
    "tiny": SHAPES["tiny"],
    "small": SHAPES["tiny"] | dict(num_hidden_layers=8),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8),
    "3b": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
               num_key_value_heads=8),
    "8b": SHAPES["llama-8b"],
    "32b": dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                num_key_value_heads=8),
    "70b": SHAPES["llama-70b"],
}  # fmt: skip
"""1B, 3B, 8B and 70B as Llama 3 has them, 32B as Qwen 2.5 has it; untied heads."""

GIB = 2**30
STEPS = 3  # the first warms up
STOP = "stop"

# For the estimate that is printed: seconds of one H100 per 1e9 parameters, from earlier runs at sequence 512.
WRITE_S, LOAD_S, STEP_S, SHARED_GPU_STEP_S = 0.4, 0.3, 0.06, 0.3
START_S = 8


def main() -> None:
    args = parse_arguments()
    results = Path(args.results)
    settings = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
                "gpus": torch.cuda.device_count(), **{name: vars(args)[name] for name in SETTINGS[2:]}}  # fmt: skip
    print(describe_machine(), flush=True)
    known = {(row["shape"], row["ranks"], *(row[name] for name in SETTINGS)) for row in read(results)}
    jobs = [(shape, ranks) for shape in args.shapes for ranks in args.ranks
            if (shape, ranks, *settings.values()) not in known]  # fmt: skip
    if jobs:
        print(HEADER, flush=True)
        run_jobs(jobs, settings, results, args.folder)
    print(f"\n{HEADER}")
    for row in read(results):
        print(line(row))
    if args.plot:
        plot(read(results), args.plot)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--shapes", nargs="*", choices=GROWTH_SHAPES, default=["1b", "3b", "8b", "32b", "70b"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--results", default="growth.jsonl")
    parser.add_argument("--plot", help="an .svg or .png to draw of all results; needs matplotlib")
    parser.add_argument("--folder", help="where a model is written for the time of its runs (70B: 36 GiB)")
    return parser.parse_args()


def run_jobs(jobs: list[tuple[str, int]], settings: dict[str, Any], results: Path, folder: str | None) -> None:
    """Measure (shape, ranks) one after another, in an order that writes each shape once."""
    cuda = settings["device"] != "CPU"
    with tempfile.TemporaryDirectory(dir=folder) as temporary, ThreadPoolExecutor(len(jobs) if cuda else 1) as pool:
        work, turns, futures = Path(temporary), {}, {}
        for job in jobs:
            turns[job] = work / f"turn-{job[0]}-{job[1]}"
            futures[job] = pool.submit(
                run_ranks, measure, str(turns[job]), settings, world_size=job[1],
                env=FSDP2_ENV if job[1] > 1 else None, process_group=job[1] > 1,
            )  # fmt: skip
        try:
            for shape in dict.fromkeys(shape for shape, _ in jobs):
                parameters = count_parameters(shape, settings["vocab_size"])
                print(f"{shape}: writing {parameters / 1e9:.1f}e9 parameters, about {start_s(parameters):.0f} s")
                (work / shape).mkdir()
                folders = write_folders(work / shape, GROWTH_SHAPES[shape], [settings["vocab_size"]])
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                for job in [job for job in jobs if job[0] == shape]:
                    print(
                        f"{shape}, {job[1]} rank(s): about {expected_s(parameters, job[1], settings):.0f} s",
                        flush=True,
                    )
                    turns[job].write_text(str(folders[settings["vocab_size"]]))
                    settle(job, futures[job], parameters, settings, results)
                shutil.rmtree(work / shape)
        finally:  # whoever still waits for a turn gets none
            for turn in turns.values():
                if not turn.exists():
                    turn.write_text(STOP)


def settle(
    job: tuple[str, int], future: Future[list[Any]], parameters: int, settings: dict[str, Any], results: Path
) -> None:
    """Wait for one job, print its row and keep it."""
    started = time.perf_counter()
    try:
        ranks = future.result()
    except ProcessException as error:
        print(f"{job[0]}, {job[1]} rank(s) FAILED: {str(error).strip().splitlines()[-1]}", flush=True)
        return
    assert all(math.isfinite(loss) for loss in ranks[0]["losses"]), "losses are not finite"
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks), "ranks disagree about the loss"
    worst = {name: max(rank[name] for rank in ranks) for name in ranks[0] if name != "losses"}
    row = {
        "shape": job[0], "parameters": parameters, "ranks": job[1], **settings, **worst, "losses": ranks[0]["losses"],
        "date": time.strftime("%Y-%m-%d"), "machine": describe_machine(),
    }  # fmt: skip
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{line(row)} {time.perf_counter() - started:.0f} s", flush=True)


def measure(turn: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One rank: wait for the turn, load, train. Seconds and GiB."""
    from peft import LoraConfig

    from hf_fsdp_qlora import load_model
    from tests.tiny_tokenizer import make_tokenizer

    tokenizer = make_tokenizer()
    model_path = wait_for(Path(turn))
    cuda = torch.cuda.is_available()
    first = torch.zeros(1, device="cuda" if cuda else "cpu")
    if dist.is_initialized():
        dist.all_reduce(first)
    with PeakMemory("RssAnon", "RssShmem") as memory:
        model = load_model(
            model_path, peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    report = model.load_report
    host = memory.peak_bytes - memory.before_bytes - (0 if cuda else report.local_bytes)
    clock = Clock()
    loading_gib = _peak_gib()
    losses = train(model, clock, settings, tokenizer, f"{model_path}-out")
    return {
        "load_s": report.seconds, "host_gib": host / GIB, "shard_gib": report.local_bytes / GIB,
        "gpu_loading_gib": loading_gib, "gpu_training_gib": _peak_gib(), "step_s": clock.step_s, "losses": losses,
    }  # fmt: skip


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @property
    def step_s(self) -> float:
        """The median, without the first step."""
        return statistics.median(self.seconds[1:])

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def train(model: Any, clock: Clock, settings: dict[str, Any], tokenizer: Any, output_dir: str) -> list[float]:
    """Losses of every step, of all ranks together."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 259, (STEPS * settings["batch_size"] * 4, settings["seq_len"]), generator=generator)
    args = SFTConfig(
        output_dir=output_dir, per_device_train_batch_size=settings["batch_size"], max_steps=STEPS,
        max_length=settings["seq_len"], learning_rate=1e-4, gradient_checkpointing=True, bf16=cuda, use_cpu=not cuda,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # a plain process must not become DataParallel where there are two GPUs
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=tokenizer, callbacks=[clock],
    )  # fmt: skip
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def wait_for(turn: Path) -> str:
    """The model's folder, once the file names it.

    Raises:
        RuntimeError: it says that the benchmark ends.
    """
    while not (turn.exists() and turn.read_text()):
        time.sleep(0.05)
    if turn.read_text() == STOP:
        raise RuntimeError("an earlier run ended the benchmark")
    return turn.read_text()


def count_parameters(shape: str, vocab_size: int) -> int:
    """Parameters of the model, adapters aside."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocab_size, **GROWTH_SHAPES[shape]))
    return sum(parameter.numel() for parameter in model.parameters())


def start_s(parameters: int) -> float:
    """Seconds to write a folder."""
    return 1 + WRITE_S * parameters / 1e9


def expected_s(parameters: int, ranks: int, settings: dict[str, Any]) -> float:
    """Seconds that a job takes once it has its turn."""
    shares = ranks > max(1, settings["gpus"])
    per_step = (SHARED_GPU_STEP_S if shares else STEP_S) * settings["seq_len"] * settings["batch_size"] / 512
    return START_S + parameters / 1e9 * (LOAD_S + STEPS * per_step)


def _peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
