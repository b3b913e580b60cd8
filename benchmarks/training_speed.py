"""Training speed through the stock SFTTrainer, this package beside the stock stack, on the same weights and data.

    PYTHONPATH=. python3 benchmarks/training_speed.py --shape llama-8b --batch 1 4 --folder /dev/shm

Writes a random model in bitsandbytes NF4 with double quantisation, which both stacks load as it is, gives every model
the same LoRA weights (r=16, all linear layers), and trains each variant for a few steps, in bf16. The losses of all
variants must agree step by step within what bf16 allows (`--tolerance`, relative), and must have fallen by more than
that; a row says so where they do not, and the run fails at its end. The first steps warm up (and compile); the time
per step is of all others together, with the fetching of batches between them, and logs as TRL's default (every tenth).

Variants, all with gradient checkpointing unless they say otherwise:

  stock           transformers + bitsandbytes + PEFT
  stock_compiled  the same, each decoder layer compiled
  plain           this package, PEFT's own LoRA arithmetic
  eager           this package as it is: LoRA added by the base's product
  compiled        eager, each decoder layer compiled; layers of one input compute together
  opaque          compiled, with the dequantisation as an operation that the compiler does not look into
  some            compiled, the first `--checkpoint-layers` layers recomputed, the others keep their activations
  none            compiled, nothing recomputed
  budget:X        compiled, the compiler recomputes inside the layers to an `activation_budget` of X
  budget_apart:X  the same, each linear layer by itself

`VARIANT+bf16` holds adapters and their moments in bf16, as TRL makes those of the stock stack; this package's own are
float32 masters otherwise. `VARIANT@N` runs with a batch of N, whatever `--batch` says.

`--profile` adds a step under torch's profiler for each variant: kernels by time, and how long the GPU was idle.

Every variant is printed when it is done, so a run that is cut off has not been for nothing. Without a GPU seconds are
those of the processor, of all threads: what else the machine does disturbs them less than the clock.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from large_shapes import SHAPES, write_model
from launch import describe_machine
from torch import nn
from trace_overlap import idle_lines, read_trace
from transformers import TrainerCallback

from hf_fsdp_qlora import siblings

SIBLINGS = siblings.NAMES
GIB = 2**30
VARIANTS = ("stock", "stock_compiled", "plain", "eager", "compiled", "opaque", "some", "none")
USUAL = ("stock", "stock_compiled", "plain", "eager", "compiled", "some", "none")
WARM_STEPS = 3
HEADER = (
    "| variant | batch | tok/s | s per step | peak GiB | reserved GiB | load s | compile s | whole s | losses |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    args = parse_arguments()
    SHAPES["chosen"] = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    print(describe_machine())
    print(
        f"{args.shape}, {SHAPES['chosen']['num_hidden_layers']} layers, vocabulary {args.vocab_size}, sequence "
        f"{args.seq_len}, LoRA r=16 on all linear layers, NF4 with double quantisation; {args.steps} steps"
    )
    failed = False
    try:
        started = time.perf_counter()
        write_model(folder, "chosen", args.vocab_size)
        shutil.rmtree(folder / "original", ignore_errors=True)  # the 16-bit config, where the writer leaves one
        print(f"model written in {time.perf_counter() - started:.1f} s", flush=True)
        results: list[dict[str, Any]] = []
        for variant, batch_size in runs(args):
            try:
                result = run(variant, batch_size, args, str(folder / "nf4"))
            except RuntimeError as error:  # CUDA's, the compiler's: the other variants may still run
                print(f"| {variant} | {batch_size} | FAILED: {str(error).strip()[-600:]} |", flush=True)
                failed = True
                continue
            results.append(result)
            result["line"] += loss_problem(results, args.tolerance)
            print(f"{HEADER}\n{result['line']}\n{result['profile']}", flush=True)
    finally:
        shutil.rmtree(folder)
    print(HEADER)
    for result in results:
        print(result["line"])
    if failed or any(loss_problem(results[: index + 1], args.tolerance) for index in range(len(results))):
        raise SystemExit("a variant failed, or its losses are not as they must be: see the rows")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--variants", nargs="+", type=variant_name, default=list(USUAL))
    parser.add_argument("--checkpoint-layers", type=int, default=0, help="of the variant `some`")
    parser.add_argument("--steps", type=int, default=8, help="timed steps; one of eight writes a log")
    parser.add_argument("--tolerance", type=float, default=5e-3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--folder", help="where the model is written for the time of the run")
    args = parser.parse_args()
    if args.profile and not torch.cuda.is_available():
        parser.error("--profile needs a GPU")
    return args


def variant_name(text: str) -> str:
    """One of `VARIANTS`, or "budget:X" or "budget_apart:X", and "+bf16" and "@N" behind it or not."""
    variant, _, batch_size = text.partition("@")
    variant = variant.removesuffix("+bf16")
    kind, _, budget = variant.partition(":")
    if kind in ("budget", "budget_apart"):
        float(budget)
    elif variant not in VARIANTS:
        raise ValueError(text)
    int(batch_size or 1)
    return text


def runs(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(variant, batch size) of every run, in order."""
    asked = [(variant.partition("@"), batch_size) for batch_size in args.batch for variant in args.variants]
    return list(dict.fromkeys((name, int(own or batch_size)) for (name, _, own), batch_size in asked))


def run(variant: str, batch_size: int, args: argparse.Namespace, model_path: str) -> dict[str, Any]:
    """Load and train one variant.

    Returns:
        "losses" of every step, and the texts "line" (a row of the table) and "profile".
    """
    from hf_fsdp_qlora.lora import QuantizedLoraLinear
    from hf_fsdp_qlora.quantization.bitsandbytes import FourBitBackend

    torch.compiler.reset()
    QuantizedLoraLinear.fuse = not variant.startswith("plain")
    siblings.NAMES = () if variant.startswith(("plain", "opaque", "budget_apart")) else SIBLINGS
    FourBitBackend.trace_kernel = not variant.startswith("opaque")
    started = time.perf_counter()
    if variant.startswith("stock"):
        model = load_stock(model_path, compiled=variant == "stock_compiled")
    else:
        model = load_ours(model_path, variant, args.checkpoint_layers)
    loaded_s = time.perf_counter() - started
    fill_adapter(model)
    clock = Clock(args.steps, args.profile)
    losses = train(
        model, clock, batch_size, args, checkpointing=not variant.startswith("none"), output_dir=f"{model_path}-out"
    )
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    step_s = clock.steps_s / args.steps
    line = (
        f"| {variant} | {batch_size} | {batch_size * args.seq_len / step_s:,.0f} | {step_s:.3f} | "
        f"{clock.peak_bytes / GIB:.2f} | {clock.reserved_bytes / GIB:.2f} | {loaded_s:.1f} | "
        f"{clock.first_step_s - step_s:.1f} | {time.perf_counter() - started:.1f} | "
        f"{' '.join(f'{loss:.3f}' for loss in losses)} |"
    )
    name = f"{variant}, batch {batch_size}"
    return {"name": name, "batch": batch_size, "losses": losses, "line": line, "profile": clock.profile_text}


def load_stock(model_path: str, *, compiled: bool) -> nn.Module:
    """What a stock QLoRA script does."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from hf_fsdp_qlora.layer_options import compile_layers
    from hf_fsdp_qlora.skeleton import decoder_layers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16, device_map={"": device})
    if compiled:
        compile_layers(decoder_layers(model))
    return get_peft_model(model, lora_config())


def load_ours(model_path: str, variant: str, checkpoint_layers: int) -> nn.Module:
    from hf_fsdp_qlora import load_model

    plain = variant.removesuffix("+bf16")
    kind, _, budget = plain.partition(":")
    return load_model(
        model_path, peft_config=lora_config(), dtype=torch.bfloat16,
        adapter_dtype=torch.float32 if plain == variant else torch.bfloat16,
        compile_layers=kind in ("compiled", "opaque", "some", "none", "budget", "budget_apart"),
        checkpoint_layers=checkpoint_layers if kind == "some" else None,
        activation_budget=float(budget) if budget else None,
    )  # fmt: skip


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def fill_adapter(model: nn.Module) -> None:
    """The same values for every stack; B is not zero, so that the first loss sees the adapter."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 1e-3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def train(
    model: nn.Module, clock: Clock, batch_size: int, args: argparse.Namespace, *, checkpointing: bool, output_dir: str
) -> list[float]:
    """Losses of every step. The text repeats itself, so that a few steps learn something."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.tiny_tokenizer import make_tokenizer

    cuda = torch.cuda.is_available()
    steps = WARM_STEPS + args.steps + int(args.profile)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 259, (steps * batch_size, 64), generator=generator)
    words[:, :48] = words[0, :48]
    rows = words.repeat(1, -(-args.seq_len // 64))[:, : args.seq_len]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=output_dir, per_device_train_batch_size=batch_size, max_steps=steps, max_length=args.seq_len,
            learning_rate=2e-4, lr_scheduler_type="constant", gradient_checkpointing=checkpointing, bf16=True,
            use_cpu=not cuda, save_strategy="no", report_to=[], disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=make_tokenizer(),
        callbacks=[clock],
    )  # fmt: skip
    losses: list[torch.Tensor] = []
    stock = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = stock(*args, **kwargs)
        losses.append(loss.detach())  # a number in the log of every step would wait for the GPU
        return loss

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    trainer.train()
    return [loss.item() for loss in losses]


class Clock(TrainerCallback):
    """Seconds of the first step and of the timed ones, the peak of memory, and a profile of the step after the last.

    Attributes:
        first_step_s: with what is compiled in it.
        steps_s: all timed steps, from the begin of the first to the end of the last.
        peak_bytes, reserved_bytes: of all steps until then.
    """

    def __init__(self, steps: int, profile: bool) -> None:
        self.last_step = WARM_STEPS + steps
        self.profiler = None
        self.wants_profile = profile
        self.started = self.first_step_s = self.steps_s = 0.0
        self.peak_bytes = self.reserved_bytes = 0
        self.profile_text = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if state.global_step == self.last_step and self.wants_profile:
            kinds = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else None
            self.profiler = torch.profiler.profile(activities=kinds)
            self.profiler.__enter__()
        if state.global_step in (0, WARM_STEPS, self.last_step):
            self.started = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.first_step_s = _now() - self.started
        elif state.global_step == self.last_step:
            self.steps_s = _now() - self.started
            if torch.cuda.is_available():
                self.peak_bytes = torch.cuda.max_memory_allocated()
                self.reserved_bytes = torch.cuda.max_memory_reserved()
        elif self.profiler is not None:
            seconds = _now() - self.started
            self.profiler.__exit__(None, None, None)
            self.profile_text = summarize(self.profiler, seconds)


def summarize(profiler: Any, seconds: float) -> str:
    """The GPU's busy time and its longest kernels, by name."""
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    busy_s = sum(event.self_device_time_total for event in kernels) / 1e6
    launches = sum(event.count for event in kernels)
    lines = [f"step {seconds:.3f} s, GPU busy {busy_s:.3f} s, {launches} kernels and copies"]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        lines += idle_lines(read_trace(file.name))
    lines += [
        f"  {event.self_device_time_total / 1e3:8.2f} ms {event.count:6d} x "
        f"{event.self_device_time_total / event.count:8.1f} us  {event.key[:110]}"
        for event in kernels[:22]
    ]
    return "\n".join(lines)


def loss_problem(results: list[dict[str, Any]], tolerance: float) -> str:
    """What is wrong with the losses of the last result, beside the first one of its batch size; "" if nothing is."""
    mine = results[-1]["losses"]
    wanted = next(result for result in results if result["batch"] == results[-1]["batch"])["losses"]
    off = max(abs(one - other) / other for one, other in zip(mine, wanted, strict=True))
    if not off <= tolerance:  # NaN is a problem too
        return f" LOSSES ARE {off:.1e} OFF |"
    return "" if wanted[0] - wanted[-1] > tolerance * wanted[0] else " NOTHING WAS LEARNED |"


def _now() -> float:
    """Seconds, when the device has done what it was asked for."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
