"""The stock SFTTrainer on sharded 4-bit models, every story against one process, an uninterrupted run or stock code.

    PYTHONPATH=. python benchmarks/trainer_check.py

Needs one GPU, which two NCCL ranks share, or two. Without a GPU it runs on gloo ranks on the CPU. The model is a tiny
random Llama made on the spot. Every run generates and evaluates before it trains, evaluates and saves in mid-training
and goes on, has accumulation, clipping and gradient checkpointing, compares all quantised bytes every other step, and
generates again. Then runs are resumed, also on other numbers of ranks, and the adapters are evaluated by stock PEFT on
stock bitsandbytes.

Ends with one line per check; the exit status is 1 if any failed. A run that dies fails its own checks only.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from launch import FSDP2_ENV, describe_machine
from stories import Failure, Group, Story, tell_all
from tiny_llama import SMALL, save_tiny_llama
from trainer_stories import ENV, RESUMED, RUNS, SAVED_AT, STOCK, resumed_name, stock_losses, stock_name, train
from trainer_verdicts import Results, checks, perform

SHARDED = {**FSDP2_ENV, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
# Group: (ranks, what the launcher sets, with a process group).
ENGINES: dict[str, tuple[int, dict[str, str], bool]] = {
    "one": (1, {}, False),
    "fsdp2": (2, FSDP2_ENV, True),
    "offload": (2, FSDP2_ENV, True),
    "sharded": (2, SHARDED, True),
    "one-rank": (1, FSDP2_ENV, True),
    "ddp": (2, {}, True),
}


def main() -> int:
    print(describe_machine(), flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_llama(folder / "model", **SMALL)
        outcomes = tell_all(first_groups(folder))
        outcomes |= tell_all(second_groups(folder))
        results = Results(folder, outcomes)
        for (engine, run), outcome in outcomes.items():
            if isinstance(outcome, Failure):
                print(f"{engine} {run} failed:\n{outcome.reason}\n")
        verdicts = [(what, perform(check)) for what, check in checks(results)]
    width = max(len(what) for what, _ in verdicts)
    for what, (good, measured) in verdicts:
        print(f"{what:<{width}}  {'ok  ' if good else 'FAIL'}  {measured}")
    failed = sum(not good for _, (good, _) in verdicts)
    kind = "NCCL" if torch.cuda.is_available() else "gloo"
    print(f"{len(verdicts) - failed} of {len(verdicts)} checks ok; {kind}; {time.perf_counter() - started:.0f} s")
    return int(bool(failed))


def first_groups(folder: Path) -> dict[str, Group]:
    """The uninterrupted runs."""
    groups = {}
    for engine, (world_size, env, process_group) in ENGINES.items():
        stories = {
            name: Story(train, (str(folder / "model"), str(folder / f"{engine}-{name}"), run), ENV.get(name, {}))
            for (of, name), run in RUNS.items()
            if of == engine
        }
        groups[engine] = Group(stories, world_size, env, process_group)
    return groups


def second_groups(folder: Path) -> dict[str, Group]:
    """What goes on from the first runs' directories."""
    model = str(folder / "model")
    groups = {}
    for engine in dict.fromkeys(engine for engine, _ in RESUMED):
        stories = {}
        for source, name in [source for of, source in RESUMED if of == engine]:
            story = resumed_name(source, name)
            checkpoint = str(folder / f"{source}-{name}" / f"checkpoint-{SAVED_AT}")
            args = (model, str(folder / f"{engine}-{story}"), RUNS[source, name], checkpoint)
            stories[story] = Story(train, args, ENV.get(name, {}))
        world_size, env, process_group = ENGINES[engine]
        groups[engine] = Group(stories, world_size, env, process_group)
    stock = {
        stock_name(*source): Story(stock_losses, (model, str(folder / "-".join(source) / "final"), RUNS[source].dtype))
        for source in STOCK
    }
    return {**groups, "one": Group(stock, 1, {}, process_group=False)}


if __name__ == "__main__":
    raise SystemExit(main())
