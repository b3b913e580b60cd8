"""QLoRA on real text under FSDP2, beside an unsharded reference: the same losses, and the same adapter in stock PEFT.

    python benchmarks/shakespeare.py --model path/to/base-13m --data path/to/data [--processes 2] [--steps 100]

Settings: NF4 with double quantisation, LoRA r=8 on all linear layers (alpha 16), AdamW 2e-3 without weight decay,
clipping 1.0, 10 warm-up steps, a cosine over 300 steps to 10 %, 8 sequences of 512 packed tokens per step, drawn with
replacement by a CPU generator. The reference rows of base-13m used the same on one H200 with unsharded bitsandbytes.

Afterwards one more process loads the adapter with stock PEFT on a stock transformers + bitsandbytes model, and its
evaluation loss must be that of the sharded model to 1e-3. On AVX512 machines bitsandbytes has a CPU kernel of its own
for evaluation, whose products differ from those with the weights that it dequantises; its loss is printed beside.

On a machine with GPUs the ranks use them.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from launch import FSDP2_ENV, describe_machine, run_ranks
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_fsdp_qlora import load_model, save_adapter
from hf_fsdp_qlora.distributed import rank as own_rank
from hf_fsdp_qlora.distributed import world_size

SEQUENCE_TOKENS = 512
GLOBAL_BATCH = 8
EVAL_BATCH = 4
LORA_RANK = 8
PEAK_LR = 2e-3
WARMUP_STEPS = 10
FINAL_LR_FRACTION = 0.1
CLIP_NORM = 1.0
ADAPTER_TOLERANCE = 1e-3
REFERENCE = {0: 5.886, 50: 3.977, 100: 3.764, 200: 3.613, 300: 3.570}
"""base-13m, QLoRA r=8, unsharded bitsandbytes, bf16 autocast, one H200, torch 2.11."""


@dataclass(frozen=True)
class Outcome:
    """Evaluation loss by step, and seconds per training step, of one rank."""

    losses: dict[int, float]
    step_s: float


def main(args: argparse.Namespace) -> None:
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        adapter = args.output or str(Path(folder) / "adapter")
        outcomes = run_ranks(train, args, adapter, world_size=args.processes, env=FSDP2_ENV)
        losses = outcomes[0].losses
        assert all(outcome.losses == losses for outcome in outcomes), "the ranks disagree about the loss"
        ((stock, stock_kernel),) = run_ranks(evaluate_with_stock, args, adapter, world_size=1)
    print(f"\n{args.processes} ranks, FSDP2, {args.dtype}, {outcomes[0].step_s:.2f} s per step")
    print(f"{'step':>6} {'eval loss':>10} {'reference':>10} {'difference':>11}")
    for step, loss in losses.items():
        reference = REFERENCE.get(step) if args.schedule_steps == max(REFERENCE) else None
        beside = f"{reference:10.3f} {loss - reference:+11.3f}" if reference else f"{'-':>10} {'-':>11}"
        print(f"{step:6d} {loss:10.4f} {beside}")
    sharded = losses[args.steps]
    print(f"evaluation loss after {args.steps} steps, sharded: {sharded:.6f}")
    print(f"adapter in stock PEFT on stock bitsandbytes: {stock:.6f}, with its evaluation kernel: {stock_kernel:.6f}")
    if abs(stock - sharded) > ADAPTER_TOLERANCE:
        raise SystemExit(f"they differ by {abs(stock - sharded):.5f}, more than {ADAPTER_TOLERANCE}")


def train(args: argparse.Namespace, adapter: str) -> Outcome:
    """Train on one rank of several; rank 0 prints. Saves the adapter and returns the losses."""
    training, evaluation = read_packed(args, "train"), read_packed(args, "eval")
    model = load_model(
        args.model,
        quantization_config=quantization(args),
        peft_config=LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        dtype=args.dtype,
        seed=0,
    )
    assert isinstance(model, PeftModel)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_fraction(step, args.schedule_steps))
    losses = {0: evaluate(model, evaluation)}
    report(0, losses[0])
    training_s = 0.0
    for step, batch in enumerate(batches(training, args.steps), start=1):
        started = time.perf_counter()
        model.train()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        training_s += time.perf_counter() - started
        if step % args.eval_every == 0 or step == args.steps:
            losses[step] = evaluate(model, evaluation)
            report(step, losses[step], f"{training_s / step:.2f} s per step")
    save_adapter(model, adapter)
    return Outcome(losses, training_s / args.steps)


def evaluate_with_stock(args: argparse.Namespace, adapter: str) -> tuple[float, float]:
    """Evaluation loss of the saved adapter in stock PEFT on a stock 4-bit model, in one process: as the model runs in
    training (nothing here has dropout), and in evaluation mode."""
    device = PartialState().device
    base = AutoModelForCausalLM.from_pretrained(
        args.model,
        quantization_config=quantization(args),
        dtype=getattr(torch, args.dtype),
        device_map={"": device},
    )
    model, sequences = PeftModel.from_pretrained(base, adapter), read_packed(args, "eval")
    return evaluate(model, sequences, mode="train"), evaluate(model, sequences)


def evaluate(
    model: nn.Module, sequences: Tensor, mode: Literal["train", "eval"] = "eval", *, batch: int = EVAL_BATCH
) -> float:
    """Mean token loss over all sequences, (n, 512). Collective: each rank takes a part of them."""
    ranks, rank = world_size(), own_rank()
    sums = torch.zeros(2, dtype=torch.float64, device=sequences.device)
    model.train(mode == "train")
    with torch.no_grad():
        # Every rank runs the same number of forwards, as FSDP needs; those past the end count for nothing.
        for start in range(0, len(sequences), batch * ranks):
            first = start + batch * rank
            rows = sequences[first : first + batch]
            logits = model(input_ids=rows if len(rows) else sequences[:1], use_cache=False).logits
            if len(rows):
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")
                sums += torch.stack([loss.double(), torch.tensor(rows[:, 1:].numel()).to(loss)])
    if ranks > 1:
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def batches(sequences: Tensor, steps: int, *, seed: int = 0, batch: int = GLOBAL_BATCH) -> Iterator[Tensor]:
    """This rank's part of each global batch, drawn with replacement; the same draws on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = torch.randint(len(sequences), (batch,), generator=generator)
        yield sequences[drawn[own_rank() :: world_size()].to(sequences.device)]


def read_packed(args: argparse.Namespace, split: str) -> Tensor:
    """The texts of a split between bos and eos, joined and cut into (n, 512) token ids; the rest is dropped."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens: list[int] = []
    with open(Path(args.data) / f"shakespeare_{split}.jsonl", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    count = len(tokens) // SEQUENCE_TOKENS
    return torch.tensor(tokens[: count * SEQUENCE_TOKENS], device=PartialState().device).view(count, SEQUENCE_TOKENS)


def lr_fraction(step: int, schedule_steps: int) -> float:
    """Of the peak learning rate, for the step after `step` steps."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = min((step - WARMUP_STEPS) / (schedule_steps - WARMUP_STEPS), 1.0)
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * (1 + math.cos(math.pi * progress)) / 2


def quantization(args: argparse.Namespace) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, args.dtype),
    )


def report(step: int, loss: float, extra: str = "") -> None:
    if own_rank() == 0:
        print(f"step {step}: eval loss {loss:.4f} {extra}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of base-13m, or another causal language model")
    parser.add_argument("--data", required=True, help="folder with shakespeare_train.jsonl and shakespeare_eval.jsonl")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--schedule-steps", type=int, default=300)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--output", help="where to keep the adapter")
    main(parser.parse_args())
