"""Every quantised format on every engine: bytes against the format's own library, and losses against one process.

    PYTHONPATH=. python benchmarks/format_matrix.py [--formats nf4 "hqq 4" ...] [--engines fsdp2 ...]

Needs one GPU, which two NCCL ranks share, or two. Without a GPU it runs on two gloo ranks; FSDP1's offload is left out
there, because torch pins memory for it. The model is a tiny random Llama made on the spot.

A cell loads the model in bf16 on every rank, compares each quantised weight, dequantised whole, with what the library
itself makes of the whole tensor on the same device (bit by bit; the references are those of tests/conformance), trains
two steps with the stock SFTTrainer, compares all weights again, and lets the package compare all gathered rows with
what was loaded. "ok" also says that losses are within LOSS_LIMIT of one process; the figure is the largest relative
difference. Ends with a table for RESULTS.md; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from fsdp1_check import FSDP1_ENV, LOSS_LIMIT, loss_error
from integrity_ours import plain_name
from launch import FSDP2_ENV, describe_machine
from peft import LoraConfig
from stock_trainer import logged, make_trainer
from stories import Failure, Group, Outcome, Story, tell_all
from tiny_llama import SEQUENCES, SMALL, linear_weights, save_tiny_llama, tokens

from hf_fsdp_qlora import QuantizedLinear, load_model
from hf_fsdp_qlora.integrity import check_integrity
from tests.conformance.cases import CASES

STEPS = 2
LAYERS = 7 * SMALL["num_hidden_layers"]

FORMATS = {
    "NF4": "nf4",
    "NF4, double quantisation": "nf4 nested",
    "FP4": "fp4",
    "HQQ 8 bit": "hqq 8",
    "HQQ 4 bit": "hqq 4",
    "HQQ 3 bit": "hqq 3",
    "HQQ 2 bit": "hqq 2",
    "dynamic int8": "dynamic int8",
    "linear int8": "linear int8",
}
"""Row of the table: case of the conformance suite."""

OFFLOAD = {"FSDP_OFFLOAD_PARAMS": "true"}
SINGLE = "single"
# Column of the table: (ranks, what the launcher sets, offload).
ENGINES: dict[str, tuple[int, dict[str, str], str]] = {
    SINGLE: (1, {}, "none"),
    "DDP": (2, {}, "none"),
    "FSDP2": (2, FSDP2_ENV, "none"),
    "FSDP2 base": (2, FSDP2_ENV, "base"),
    "FSDP2 all": (2, {**FSDP2_ENV, **OFFLOAD}, "all"),
    "FSDP1": (2, FSDP1_ENV, "none"),
    "FSDP1 base": (2, {**FSDP1_ENV, "FSDP_USE_ORIG_PARAMS": "true"}, "base"),
    "FSDP1 all": (2, {**FSDP1_ENV, **OFFLOAD}, "all"),
}
CUDA_ONLY = ("FSDP1 base", "FSDP1 all")


@dataclass(frozen=True)
class Cell:
    """What one rank brings back: weights equal to the library's before and after training, of LAYERS each."""

    equal_before: int
    equal_after: int
    rows_compared: int
    losses: list[float]
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS.values(), default=list(FORMATS.values()))
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES], default=[*ENGINES])
    asked = parser.parse_args()
    formats = {title: case for title, case in FORMATS.items() if case in asked.formats}
    cuda = torch.cuda.is_available()
    engines = [
        name for name in ENGINES if name in (SINGLE, *asked.engines) and (cuda or name not in CUDA_ONLY)
    ]  # losses are compared with the single process, so that one is always there
    print(describe_machine(), flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_tiny_llama(path, **SMALL)
        outcomes = tell_all({name: group_of(name, str(path), folder, formats) for name in engines})
    return report(formats, engines, outcomes, time.perf_counter() - started)


def group_of(engine: str, path: str, folder: str, formats: dict[str, str]) -> Group:
    """All formats of one engine."""
    world_size, env, offload = ENGINES[engine]
    output = str(Path(folder) / engine.replace(" ", "-"))
    stories = {title: Story(look, (path, output, case, offload)) for title, case in formats.items()}
    return Group(stories, world_size, env, process_group=world_size > 1)


def look(path: str, output: str, case_name: str, offload: str) -> Cell:
    """On every rank: load, compare, train, compare."""
    started = time.perf_counter()
    case, device = CASES[case_name], PartialState().device
    expected = {name: case.reference(weight.to(device)).cpu() for name, weight in linear_weights(path).items()}
    model: Any = load_model(
        path,
        quantization_config=case.make_config(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        dtype=torch.bfloat16,
        offload=offload,
    )
    layers = {plain_name(name): layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    before = count_equal(layers, expected)
    trainer = make_trainer(
        model, output, tokens(SEQUENCES).repeat(STEPS, 1), max_steps=STEPS, save_strategy="no", learning_rate=1e-2,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    rows = check_integrity(trainer.model)  # type: ignore[arg-type]
    after = count_equal(layers, expected)
    return Cell(before, after, rows, logged(trainer, "loss"), time.perf_counter() - started)


def count_equal(layers: dict[str, QuantizedLinear], expected: dict[str, torch.Tensor]) -> int:
    """Layers whose whole weight is the library's, bit by bit. Collective where it is sharded: no short cuts."""
    assert layers.keys() == expected.keys(), "the package and the benchmark disagree about what is quantised"
    return sum([torch.equal(layer.dequantize().cpu(), expected[name]) for name, layer in layers.items()])


def report(
    formats: dict[str, str], engines: list[str], outcomes: dict[tuple[str, str], Outcome], seconds: float
) -> int:
    """Print what failed, then the table. Returns the exit status."""
    verdicts = {(engine, title): judge(engine, title, outcomes) for engine in engines for title in formats}
    for (engine, title), (good, measured) in verdicts.items():
        if not good:
            print(f"FAIL {title} on {engine}: {measured}\n")
    failed = sum(not good for good, _ in verdicts.values())
    print("| format | " + " | ".join(engines) + " |\n| --- |" + " --- |" * len(engines))
    for title in formats:
        cells = ["ok " + measured if good else "FAIL" for good, measured in (verdicts[e, title] for e in engines)]
        print(f"| {title} | " + " | ".join(cells) + " |")
    kind = "NCCL" if torch.cuda.is_available() else "gloo"
    print(f"{len(verdicts) - failed} of {len(verdicts)} cells ok; two {kind} ranks but for {SINGLE}; {seconds:.0f} s")
    if skipped := [name for name in CUDA_ONLY if name not in engines and not torch.cuda.is_available()]:
        print(f"left out: {', '.join(skipped)} (torch pins memory for FSDP1's offload, which needs a GPU)")
    return int(bool(failed))


def judge(engine: str, title: str, outcomes: dict[tuple[str, str], Outcome]) -> tuple[bool, str]:
    """Whether a cell is good, and its figure or what is wrong."""
    ranks, single = outcomes[engine, title], outcomes[SINGLE, title]
    if isinstance(ranks, Failure):
        return False, ranks.reason
    for rank, cell in enumerate(ranks):
        if (cell.equal_before, cell.equal_after) != (LAYERS, LAYERS) or cell.rows_compared < LAYERS:
            return False, (
                f"rank {rank}: {cell.equal_before} of {LAYERS} weights equal when loaded, {cell.equal_after} after "
                f"training; {cell.rows_compared} rows compared"
            )
    if isinstance(single, Failure):
        return False, "bytes are right, but there are no losses of one process to compare with"
    gap = max(loss_error(cell.losses, single[0].losses) for cell in ranks)
    if not gap <= LOSS_LIMIT:
        return False, f"bytes are right, losses off by {gap:.1e}: {ranks[0].losses} against {single[0].losses}"
    losses = " ".join(f"{loss:.4f}" for loss in ranks[0].losses)
    return True, losses if engine == SINGLE else f"{gap:.0e}"


if __name__ == "__main__":
    raise SystemExit(main())
