"""What must hold after the runs of trainer_check.py: one function per kind of check, each a verdict and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fsdp1_check import adapter_error, loss_error
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from stories import Failure, Outcome
from trainer_stories import CLIP_NORM, FP32, RESUMED, RUNS, SAVED_AT, STEPS, STOCK, Report, resumed_name, stock_name
from transformers import AutoModelForCausalLM

LOSS_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Relative, as in byte_integrity.py."""
ADAPTER_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Relative, over all tensors: Adam turns rounding in small gradients into steps of full size."""
STOCK_LIMIT = 1e-3

Check = tuple[bool, str]


@dataclass(frozen=True)
class Results:
    """What the runs left behind: reports by rank in memory, directories on disk."""

    folder: Path
    outcomes: dict[tuple[str, str], Outcome]

    def ranks(self, engine: str, run: str) -> list[Any]:
        """The reports.

        Raises:
            RuntimeError: the run failed.
        """
        outcome = self.outcomes[engine, run]
        if isinstance(outcome, Failure):
            raise RuntimeError(f"{engine} {run} failed")
        return outcome

    def directory(self, engine: str, run: str) -> Path:
        return self.folder / f"{engine}-{run}"

    def adapter(self, engine: str, run: str, directory: str = "final") -> dict[str, torch.Tensor]:
        return load_file(self.directory(engine, run) / directory / "adapter_model.safetensors")


def checks(results: Results) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Every line of the table."""
    for engine, run in RUNS:
        if engine != "one" and RUNS[engine, run].dtype == FP32:
            yield f"{engine} {run} = one process, fp32", lambda e=engine, a=run: same_run(results, e, a, reference(a))
    for engine in ("fsdp2", "sharded"):
        yield f"{engine} bf16 = one process, bf16", lambda e=engine: same_run(results, e, "bf16", "bf16")
    for engine, run in RUNS:
        if engine != "one" and run != "best":
            yield f"{engine} {run} generates", lambda e=engine, a=run: same_words(results, e, a, reference(a))
    for engine, run in RUNS:
        yield f"{engine} {run} saves PEFT directories", lambda e=engine, a=run: standard_directories(results, e, a)
    for engine, (source, run) in RESUMED:
        yield f"{engine} resumes {source} {run}", lambda e=engine, s=source, a=run: resumed(results, e, s, a)
    for engine in ("fsdp2", "sharded"):
        yield f"{engine} best loads the best at the end", lambda e=engine: best(results, e)
    for engine, run in STOCK:
        yield f"{engine} {run} in stock PEFT, 4 bits", lambda e=engine, a=run: stock(results, e, a)


def reference(run: str) -> str:
    """The run of one process that a run is compared with."""
    return run if run in ("bf16", "head") else "fp32"


def perform(check: Callable[[], Check]) -> Check:
    """A check that cannot be made has failed; the others go on."""
    try:
        return check()
    except (RuntimeError, OSError, KeyError, ValueError, AssertionError) as error:
        return False, f"{type(error).__name__}: {error}"


def same_run(results: Results, engine: str, run: str, of_one: str) -> Check:
    """Losses, evaluations, norms and adapters of a run against one process. All ranks."""
    dtype = RUNS[engine, run].dtype
    [expected] = results.ranks("one", of_one)
    ranks: list[Report] = results.ranks(engine, run)
    losses = max(loss_error(rank.losses, expected.losses) for rank in ranks)
    evaluations = max(
        loss_error([rank.evaluated, *rank.eval_losses], [expected.evaluated, *expected.eval_losses]) for rank in ranks
    )
    norms = max(loss_error(rank.grad_norms, expected.grad_norms) for rank in ranks)
    adapters = adapter_error(results.adapter(engine, run), results.adapter("one", of_one))
    assert len(expected.losses) == STEPS and len(expected.eval_losses) == STEPS // SAVED_AT
    assert min(expected.grad_norms) > CLIP_NORM, f"clipping did not happen at every step: {expected.grad_norms}"
    assert all(rank.rows > 0 and rank.adapter_dtypes == {torch.float32} for rank in ranks)
    good = max(losses, evaluations) <= LOSS_LIMITS[dtype] and adapters <= ADAPTER_LIMITS[dtype]
    measured = f"losses {losses:.0e}, evaluations {evaluations:.0e}, norms {norms:.0e}, adapters {adapters:.0e}"
    return good, measured


def same_words(results: Results, engine: str, run: str, of_one: str) -> Check:
    """Greedy generation against one process. After training in bf16 only the number of equal tokens is told."""
    [expected] = results.ranks("one", of_one)
    ranks: list[Report] = results.ranks(engine, run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = all(rank.before == expected.before for rank in ranks)
    alike = all(rank.after == ranks[0].after and rank.device == device for rank in ranks)
    pairs = [pair for lines in zip(ranks[0].after, expected.after, strict=True) for pair in zip(*lines, strict=True)]
    equal = sum(mine == theirs for mine, theirs in pairs)
    after = equal == len(pairs) or RUNS[engine, run].dtype != FP32
    measured = f"before training {'equal' if before else 'DIFFERENT'}, after it {equal} of {len(pairs)} tokens equal"
    if expected.before == expected.after:
        measured += ", but training changed no token"
    return before and alike and after, measured + ("" if alike else f", RANKS DISAGREE or not on {device}")


def standard_directories(results: Results, engine: str, run: str) -> Check:
    """Every saved directory has what stock PEFT would write: its keys and shapes, a config, and no base weights."""
    base = AutoModelForCausalLM.from_pretrained(results.folder / "model")
    modules = ["lm_head"] if RUNS[engine, run].head else None
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=modules)
    written = results.folder / f"peft-{bool(modules)}"
    get_peft_model(base, config).save_pretrained(written)
    expected = {key: value.shape for key, value in load_file(written / "adapter_model.safetensors").items()}
    root = results.directory(engine, run)
    directories = sorted(path for path in root.iterdir() if path.name == "final" or "checkpoint" in path.name)
    wrong = []
    for directory in directories:
        found = results.adapter(engine, run, directory.name)
        stray = [*directory.rglob("pytorch_model_fsdp*"), *directory.glob(".saving-*"), *directory.glob("model*")]
        shapes = {key: value.shape for key, value in found.items()}
        complete = shapes == expected and (directory / "adapter_config.json").is_file()
        if stray or not complete or not all(value.isfinite().all() for value in found.values()):
            wrong.append(directory.name)
    return not wrong and len(directories) >= 3, f"{len(directories)} PEFT directories" + (
        f", WRONG: {wrong}" * bool(wrong)
    )


def resumed(results: Results, engine: str, source: str, run: str) -> Check:
    """The steps after the checkpoint, and the final adapter, against the run that was not interrupted."""
    dtype = RUNS[source, run].dtype
    story = resumed_name(source, run)
    whole: Report = results.ranks(source, run)[0]
    ranks: list[Report] = results.ranks(engine, story)
    gap = max(loss_error(rank.losses, whole.losses) for rank in ranks)
    adapters = adapter_error(results.adapter(engine, story), results.adapter(source, run))
    exact = gap == 0 and adapters == 0
    good = gap <= LOSS_LIMITS[dtype] and adapters <= ADAPTER_LIMITS[dtype]
    return good, "bitwise equal" if exact else f"losses {gap:.0e}, adapters {adapters:.0e}"


def best(results: Results, engine: str) -> Check:
    """Every rank names the checkpoint with the lowest evaluation loss, it is kept, and it is what was restored."""
    ranks: list[Report] = results.ranks(engine, "best")
    losses = ranks[0].eval_losses
    step = 1 + min(range(len(losses)), key=losses.__getitem__)
    directory = results.directory(engine, "best") / f"checkpoint-{step}"
    named = {rank.best for rank in ranks} == {str(directory)}
    saved, final = results.adapter(engine, "best", directory.name), results.adapter(engine, "best")
    equal = saved.keys() == final.keys() and all(torch.equal(saved[key], final[key]) for key in saved)
    told = " ".join(f"{loss:.3f}" for loss in losses)
    tested = step != len(losses)
    measured = f"evaluations {told}, named {ranks[0].best and Path(ranks[0].best).name}, restored {equal}"
    return named and equal and tested, measured + ("" if tested else ", the last one is the best: nothing tested")


def stock(results: Results, engine: str, run: str) -> Check:
    """The evaluation loss of the final adapter in stock code, against the trainer's last one."""
    [(without, found)] = results.ranks("one", stock_name(engine, run))
    expected = results.ranks(engine, run)[0].eval_losses[-1]
    gap = abs(found - expected)
    assert abs(without - expected) > 20 * STOCK_LIMIT, "the adapter changes next to nothing, so nothing is tested"
    return gap <= STOCK_LIMIT and math.isfinite(gap), f"{found:.5f} (trainer {expected:.5f}, no adapter {without:.5f})"
