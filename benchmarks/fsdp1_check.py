"""FSDP1 through accelerate and the stock SFTTrainer, beside FSDP2 and one process: losses, bytes, adapters, resuming.

    python benchmarks/fsdp1_check.py             (PYTHONPATH=. in front where the package is not installed)

Needs one GPU, which two NCCL ranks share, or two. Without a GPU it runs on the CPU, where accelerate cannot broadcast
while it wraps, so that this part is not seen. The model is a tiny random Llama made on the spot.

Every run loads, compares dequantised weights with bitsandbytes on whole tensors, trains in bf16 with fp32 adapters,
gradient checkpointing and clipping, saves in the middle, and compares gathered rows again. Then some runs are resumed
from the checkpoint in the middle, by the engine that saved it and by others. Each run's figures are printed when it is
done, verdicts against one process at the end; the exit status is 1 if anything misses its limit or died.

140 s on two CPU cores, which are left without the offload runs; 184 s on one H100 beside other jobs.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from integrity_ours import count_differing, expect, plain_name
from launch import FSDP2_ENV, describe_machine
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from stock_trainer import logged, make_trainer
from stories import Failure, Group, Story, tell_all
from tiny_llama import SEQUENCES, four_bit, linear_weights, relative_error, save_tiny_llama, tokens
from transformers import AutoModelForCausalLM

from hf_fsdp_qlora import QuantizedLinear, WeightIntegrityCallback, load_model
from hf_fsdp_qlora.sharding import gathered_rows

STEPS, SAVED_AT = 6, 3
DTYPE = torch.bfloat16
LOSS_LIMIT = 5e-3
"""Relative, as in byte_integrity.py: rounding of bf16, 2**-8 per value, averaged out."""
ADAPTER_LIMIT = 0.05
"""Relative, against one process after all steps: Adam turns rounding in small gradients into steps of full size."""

FSDP1_ENV = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "1",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": str(torch.cuda.is_available()).lower(),
    "FSDP_SYNC_MODULE_STATES": str(torch.cuda.is_available()).lower(),
    "ACCELERATE_MIXED_PRECISION": "bf16",
}
"""What the shipped fsdp1.yaml makes `accelerate launch` set, as far as the CPU allows."""

RUNS: dict[str, tuple[int, dict[str, str], dict[str, Any]]] = {
    "one process": (1, {}, {}),
    "fsdp2": (2, FSDP2_ENV, {}),
    "fsdp1": (2, FSDP1_ENV, {}),
    "fsdp1, use_orig_params": (2, {**FSDP1_ENV, "FSDP_USE_ORIG_PARAMS": "true"}, {}),
    "fsdp1, offload all": (2, {**FSDP1_ENV, "FSDP_OFFLOAD_PARAMS": "true"}, {}),
    "fsdp1, offload base": (2, {**FSDP1_ENV, "FSDP_USE_ORIG_PARAMS": "true"}, {"offload": "base"}),
    "fsdp1, pure bf16": (2, FSDP1_ENV, {"precision": "bf16"}),
}
if not torch.cuda.is_available():  # torch pins memory for FSDP1's offload, which needs an accelerator
    RUNS = {name: run for name, run in RUNS.items() if "offload" not in name}
OTHER_DTYPE = ("fsdp1, pure bf16",)
RESUMED = {  # run: the one whose checkpoint it goes on from
    "fsdp1": "fsdp1",
    "fsdp1, use_orig_params": "fsdp1",
    "fsdp2": "fsdp1",
    "one process": "fsdp1, use_orig_params",
    "fsdp1, offload all": "fsdp2",
}


@dataclass(frozen=True)
class Run:
    """What one rank brings back. Bytes are counted against bitsandbytes on the whole tensors."""

    losses: list[float]
    compared_bytes: int
    differing_bytes: int
    weights_equal: bool
    rotary_dtype: torch.dtype
    adapter_dtypes: set[torch.dtype]
    peak_gib: float
    seconds: float


def main() -> int:
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_llama(folder / "model")
        straight = run_all(folder, dict.fromkeys(RUNS))
        middle = f"checkpoint-{SAVED_AT}"
        goals = {name: source for name, source in RESUMED.items() if name in RUNS and source in straight}
        resumed = run_all(folder, {name: place(folder, source) / middle for name, source in goals.items()})
        return report(folder, straight, resumed)


def run_all(folder: Path, runs: Mapping[str, Path | None]) -> dict[str, list[Run]]:
    """Every run, by name, from the beginning or from its checkpoint; those that died are missing. Ranks are started
    once for the runs of an engine; beside a GPU the engines run at the same time."""
    groups: dict[str, dict[str, Story]] = {}
    for name, checkpoint in runs.items():
        _, env, arguments = RUNS[name]
        what = name if checkpoint is None else f"{name} resumed"
        args = (str(folder / "model"), str(place(folder, name, checkpoint)), arguments, checkpoint and str(checkpoint))
        stories = groups.setdefault(name.partition(",")[0], {})
        stories[name] = Story(train, args, env, show=partial(in_words, what))
    told = tell_all(
        {
            engine: Group(stories, world_size=RUNS[engine][0], process_group=RUNS[engine][0] > 1)
            for engine, stories in groups.items()
        }
    )
    return {name: outcome for (_, name), outcome in told.items() if not isinstance(outcome, Failure)}


def train(path: str, output_dir: str, arguments: dict[str, Any], checkpoint: str | None) -> Run:
    """On every rank: load, check, train, check."""
    started = time.perf_counter()
    device = PartialState().device
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    expected = {name: expect(weight.to(device)) for name, weight in linear_weights(path).items()}
    model: Any = load_model(
        path,
        quantization_config=four_bit(DTYPE),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        **arguments,
    )
    layers = {plain_name(name): layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    equal = all(torch.equal(layer.dequantize(), expected[name].weight) for name, layer in layers.items())
    trainer = make_trainer(
        model, output_dir, tokens(SEQUENCES * STEPS), callbacks=[WeightIntegrityCallback()],
        max_steps=STEPS, save_steps=SAVED_AT,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(Path(output_dir) / "final"))
    names = {id(layer): name for name, layer in layers.items()}
    compared = differing = 0
    for group in gathered_rows(trainer.model):  # type: ignore[arg-type]
        for layer in group:
            wrong, total = count_differing(layer, expected[names[id(layer)]])
            compared, differing = compared + total, differing + int(wrong)
    equal = equal and all(torch.equal(layer.dequantize(), expected[name].weight) for name, layer in layers.items())
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Run(
        losses=logged(trainer, "loss"),
        compared_bytes=compared,
        differing_bytes=differing,
        weights_equal=equal,
        rotary_dtype=next(buffer.dtype for name, buffer in model.named_buffers() if name.endswith("inv_freq")),
        adapter_dtypes={p.dtype for p in trainer.model.parameters() if p.requires_grad},  # type: ignore[union-attr]
        peak_gib=peak / 2**30,
        seconds=time.perf_counter() - started,
    )


def report(folder: Path, straight: dict[str, list[Run]], resumed: dict[str, list[Run]]) -> int:
    """Print the verdicts. Returns the exit status."""
    missed = [name for name in RUNS if name not in straight]
    missed += [f"{name} resumed" for name in RESUMED if name in RUNS and name not in resumed]
    if "one process" not in straight or "fsdp2" not in straight:
        print(f"died, so that there is nothing to compare with: {', '.join(missed)}")
        return 1
    for name, ranks in straight.items():
        missed += [] if judge(folder, name, ranks, straight) else [name]
    for name in (name for name in straight if name.startswith("fsdp1") and name not in OTHER_DTYPE):
        missed += [] if compare(f"{name} against fsdp2", straight[name], straight["fsdp2"]) else [f"{name} and fsdp2"]
    for name, ranks in resumed.items():
        what = f"{name} resumed from step {SAVED_AT} of {RESUMED[name]}"
        missed += [] if compare(what, ranks, straight[RESUMED[name]]) else [f"{name} resumed"]
    if "fsdp1" in straight:
        base = AutoModelForCausalLM.from_pretrained(folder / "model")
        loaded = PeftModel.from_pretrained(base, str(place(folder, "fsdp1") / "final"))
        print(f"stock PEFT loads the adapter of fsdp1 as {type(loaded).__name__}")
    print("all within limits" if not missed else f"OUT OF LIMITS OR DIED: {', '.join(missed)}")
    return int(bool(missed))


def judge(folder: Path, name: str, ranks: list[Run], straight: dict[str, list[Run]]) -> bool:
    """Print one line: a run against one process."""
    gap = loss_error(ranks[0].losses, straight["one process"][0].losses)
    own, expected = adapter(folder, name), adapter(folder, "one process")
    plain = own.keys() == expected.keys() and not list(place(folder, name).rglob("pytorch_model_fsdp*"))
    error = adapter_error(own, expected) if plain else math.inf
    limit = math.inf if name in OTHER_DTYPE else ADAPTER_LIMIT
    good = plain and gap < LOSS_LIMIT and error < limit and all(is_sound(rank, name) for rank in ranks)
    differing = sum(rank.differing_bytes for rank in ranks)
    print(f"{name}: losses off by {gap:.1e}, adapters {error:.1e}, {differing} bytes differ on any rank  "
          f"{'ok' if good else 'BAD'}")  # fmt: skip
    return good


def compare(what: str, ranks: list[Run], others: list[Run]) -> bool:
    """Print one line: the losses of two runs."""
    gap = loss_error(ranks[0].losses, others[0].losses)
    print(f"{what}: loss error {gap:.1e}  {'ok' if gap < LOSS_LIMIT else 'BAD'}")
    return gap < LOSS_LIMIT


def is_sound(run: Run, name: str) -> bool:
    """Bytes, weights and dtypes of one rank are what they should be."""
    dtype = torch.bfloat16 if name in OTHER_DTYPE else torch.float32
    return (
        run.compared_bytes > 0
        and run.differing_bytes == 0
        and run.weights_equal
        and run.rotary_dtype == torch.float32
        and run.adapter_dtypes == {dtype}
    )


def in_words(what: str, run: Run) -> str:
    """What one rank found."""
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in run.adapter_dtypes)
    return (
        f"{what}: losses {' '.join(f'{loss:.5f}' for loss in run.losses)}\n"
        f"    {run.differing_bytes} of {run.compared_bytes} bytes differ, weights "
        f"{'equal' if run.weights_equal else 'DIFFER'}; rotary {run.rotary_dtype}, adapters {dtypes}; "
        f"{run.peak_gib:.2f} GiB, {run.seconds:.0f} s"
    )


def place(folder: Path, name: str, checkpoint: Path | None = None) -> Path:
    """The output folder of a run."""
    return folder / f"{'' if checkpoint is None else 'resumed '}{name}".replace(", ", "-").replace(" ", "-")


def adapter(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place(folder, name) / "final" / "adapter_model.safetensors")


def loss_error(losses: list[float], expected: list[float]) -> float:
    """The largest relative difference over the steps."""
    return max(abs(loss / other - 1) for loss, other in zip(losses, expected, strict=True))


def adapter_error(adapters: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative L2 error over all tensors together."""
    sides = (adapters, expected)
    flat = [torch.cat([tensors[key].flatten().float() for key in sorted(expected)]) for tensors in sides]
    return relative_error(*flat)


if __name__ == "__main__":
    raise SystemExit(main())
