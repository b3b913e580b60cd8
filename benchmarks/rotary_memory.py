"""Rotary training at 8B shape on one GPU: bytes per parameter, and the time of a step by the lowest active layer.

    python3 benchmarks/rotary_memory.py --vocab-size 32000
    python3 benchmarks/rotary_memory.py --vocab-size 128256

Writes a random bf16 Llama of that shape (16 GB of disk), then trains it through the stock SFTTrainer, each case in a
process of its own: int8 frozen, 10 % active, bf16 masters with stochastic rounding, batch 1, 512 tokens, gradient
checkpointing; with 8-bit and with fp32 moments; and for the times, all layers active over an unquantised model.

Two peaks per case, as the allocator counts them, over all steps and rotations:

- `state`: what is held while no activation is: after backward (weights, gradients, moments), at its most during the
  optimizer's step and during rotations.
- `total`: at any time, activations included.

Step times are of forward, backward and optimizer, without rotation, as the median of the steps of a visit after its
first; a rotation is timed apart. Random weights and tokens: only times and sizes mean anything. A case's figures are
printed when it is done; the tables at the end put them side by side.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from datasets import Dataset
from launch import describe_machine
from tiny_llama import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_fsdp_qlora import RotaryConfig, load_model, prepare_rotary
from hf_fsdp_qlora.safetensors_stream import SafetensorsWriter, TensorInfo

SHAPES = {
    "tiny": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4,
                 num_key_value_heads=4),
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8),
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "8-bit moments": dict(optim="adamw_8bit", active="10%", frozen="int8", visits=99),
    "fp32 moments": dict(optim="adamw_torch_fused", active="10%", frozen="int8", visits=4),
    "all active": dict(optim="adamw_8bit", active="100%", frozen="bf16", visits=1),
}
"""The first goes through all blocks, for the times; the embedding's visit, the first of all, needs the most memory."""
STEPS_PER_BLOCK = 4
GIB = 2**30


def main() -> None:
    args = parse_arguments()
    if args.case:
        print(json.dumps(run_case(args)))
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        started = time.perf_counter()
        write_model(folder, args)
        print(f"wrote the model in {time.perf_counter() - started:.0f} s", flush=True)
        results = {}
        for case in args.cases or CASES:
            started = time.perf_counter()
            results[case] = run_in_its_own_process(folder, case, args)
            print(f"{case}: {time.perf_counter() - started:.0f} s", flush=True)
            show_case(case, results[case])
    finally:
        shutil.rmtree(folder)
    show(results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="all by default")
    parser.add_argument("--folder", help="where the model is written; the system's temporary folder by default")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """Normal weights of deviation 0.02, tensor by tensor, made on the GPU if there is one."""
    shape = {**SHAPES[args.shape], **({"num_hidden_layers": args.layers} if args.layers else {})}
    config = LlamaConfig(**shape, vocab_size=args.vocab_size, max_position_embeddings=4096, dtype="bfloat16",
                         pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    config.save_pretrained(folder)
    with init_empty_weights():
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    infos = {name: TensorInfo(torch.bfloat16, tuple(parameter.shape)) for name, parameter in parameters.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    with SafetensorsWriter(folder / "model.safetensors", infos, {"format": "pt"}) as writer:
        for parameter in parameters.values():
            if parameter.dim() == 1:
                writer.append(torch.ones(parameter.shape, dtype=torch.bfloat16))
                continue
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            writer.append(values.normal_(std=0.02, generator=generator))


def run_in_its_own_process(folder: Path, case: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case, "--model", str(folder), "--seq-len", str(args.seq_len),
               "--vocab-size", str(args.vocab_size)]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_case(args: argparse.Namespace) -> dict[str, Any]:
    """Train for a sweep over the blocks, or as many visits as the case has, and report."""
    settings = CASES[args.case]
    config = RotaryConfig(active=settings["active"], frozen=settings["frozen"], master_dtype="bfloat16",
                          order="sequential", steps_per_block=STEPS_PER_BLOCK)  # fmt: skip
    tokens = torch.randint(3, args.vocab_size, (64, args.seq_len), generator=torch.Generator().manual_seed(1))
    model: Any = load_model(args.model, rotary=config, dtype=torch.bfloat16)
    rotary = prepare_rotary(model, config)
    visits = min(settings["visits"], len(rotary.plan.visits(rotary.plan.rotating)))
    data = Dataset.from_list([{"input_ids": row} for row in tokens.tolist()])
    watch = Watch(rotary)
    with tempfile.TemporaryDirectory() as output:
        training = SFTConfig(
            output_dir=output, max_steps=visits * STEPS_PER_BLOCK, per_device_train_batch_size=1,
            optim=settings["optim"], learning_rate=1e-5, gradient_checkpointing=True, max_length=args.seq_len,
            bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=training, train_dataset=data, processing_class=make_tokenizer(),
            callbacks=[watch.before, rotary.callback, watch], optimizer_cls_and_kwargs=rotary.optimizer(training),
        )  # fmt: skip
        trainer.train()
    return {"numel": rotary.plan.numel, **watch.report()}


class Before(TrainerCallback):
    """Comes before the rotary callback, so that `on_step_end` is the beginning of a rotation."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.mark("step")


class Watch(TrainerCallback):
    """Times and peaks of the phases of a step: forward and backward, optimizer, rotation."""

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.before = Before(self)
        self.steps: list[tuple[int, float]] = []  # lowest active block, seconds
        self.rotations: list[float] = []
        self.peaks: dict[str, int] = {}
        self._started_s = 0.0
        self._began_s = 0.0

    def mark(self, phase: str) -> float:
        """End a phase: keep its peak, begin to count anew. Returns its seconds."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        seconds, self._started_s = now - self._started_s, now
        return seconds

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.mark("between steps")
        self._began_s = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.mark("forward and backward")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.mark("optimizer step")
        active = self.rotary.callback.state_dict()["visit"]
        lowest = min(self.rotary.schedule.blocks_of_visit(active))
        self.steps.append((lowest, time.perf_counter() - self._began_s))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = self.mark("rotation")
        if self.rotary.callback.steps_in_visit == 0:
            self.rotations.append(seconds)

    def report(self) -> dict[str, Any]:
        times: dict[int, list[float]] = {}
        for index, (lowest, seconds) in enumerate(self.steps):
            if index % STEPS_PER_BLOCK:  # the first of a visit allocates
                times.setdefault(lowest, []).append(seconds)
        state = [self.peaks.get(phase, 0) for phase in ("optimizer step", "rotation")]
        return {
            "peaks": self.peaks,
            "state_bytes": max(state),
            "total_bytes": max(self.peaks.values(), default=0),
            "step_s": {lowest: statistics.median(values) for lowest, values in sorted(times.items())},
            "rotation_s": statistics.median(self.rotations),
            "names": [block.name for block in self.rotary.plan.blocks],
        }


def show_case(case: str, result: dict[str, Any]) -> None:
    """Everything that a case found, on lines of its own: what a time limit cannot take back."""
    peaks = ", ".join(f"{phase} {peak / GIB:.2f}" for phase, peak in result["peaks"].items())
    steps = ", ".join(f"{result['names'][int(lowest)]} {seconds:.3f}" for lowest, seconds in result["step_s"].items())
    print(
        f"    {result['numel'] / 1e9:.2f}B parameters; state {result['state_bytes'] / GIB:.2f} GiB, "
        f"{result['state_bytes'] / result['numel']:.3f} bytes per parameter; total peak "
        f"{result['total_bytes'] / GIB:.2f} GiB; rotation {result['rotation_s']:.2f} s\n"
        f"    peaks by phase, GiB: {peaks}\n"
        f"    seconds of a step by the lowest active block: {steps}",
        flush=True,
    )


def show(results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{describe_machine()}\n")
    print("| case | parameters | state, bytes per parameter | state GiB | total peak GiB | rotation s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case, result in results.items():
        numel = result["numel"]
        print(
            f"| {case} | {numel / 1e9:.2f}B | {result['state_bytes'] / numel:.3f} | {result['state_bytes'] / GIB:.2f} "
            f"| {result['total_bytes'] / GIB:.2f} | {result['rotation_s']:.2f} |"
        )
    full = results.get("all active")
    print("\n| lowest active block | " + " | ".join(f"{case}, s" for case in results) + " | over all active |")
    print("| --- |" + " --- |" * (len(results) + 1))
    rows = sorted({int(lowest) for result in results.values() for lowest in result["step_s"]})
    for row in rows:
        name = next(iter(results.values()))["names"][row]
        cells = [result["step_s"].get(str(row)) for result in results.values()]
        share = "" if full is None or cells[0] is None else f"{cells[0] / full['step_s']['0']:.2f}"
        print(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.3f}" for cell in cells) + f" | {share} |")


if __name__ == "__main__":
    main()
