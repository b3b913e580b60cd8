"""`hf-fsdp-qlora config`: ask a few questions, or take flags, and write an accelerate config and a recipe.

On a terminal choices are made with the arrow keys, in accelerate's own menu; elsewhere every question is a plain
prompt. An answer that makes no sense is asked for again, with what is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.goals import GOALS

DEFAULT_DATASET = "HuggingFaceH4/no_robots"
Ask = Callable[[str], str]
Choose = Callable[[str, Sequence[str], int], int]


@dataclass(frozen=True)
class Question:
    """One thing the wizard needs to know.

    Attributes:
        text: the question, and the flag's help.
        read: turns the answer into a value; raises ConfigError if it makes no sense.
        choices: title by answer, where there are a few.
    """

    text: str
    read: Callable[[str], Any]
    choices: Mapping[str, str] | None = None


def register(subparsers: Any) -> None:
    """Add the command and its options; what is not given is asked for, or taken from the machine with --yes."""
    parser = subparsers.add_parser("config", help="write an accelerate config and a recipe", allow_abbrev=False)
    questions = _questions(trust_remote_code=False)
    metavars = {"gpu_memory": "SIZE", "host_memory": "SIZE", "goal": "{" + ",".join(GOALS) + "}"}
    for name, question in questions.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=question.text, metavar=metavars.get(name))
    parser.add_argument("--lora-r", type=int, default=16, help="rank")
    parser.add_argument("--output-dir", default="outputs/run", help="where the run will write")
    parser.add_argument("--accelerate-config", type=Path, default=Path("accelerate.yaml"), help="file to write")
    parser.add_argument("--recipe", type=Path, default=Path("recipe.yaml"), help="file to write")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the repository")
    parser.add_argument("--yes", action="store_true", help="ask nothing; take the machine's values")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def run(args: argparse.Namespace, ask: Ask = input, choose: Choose | None = None) -> int:
    """Ask, decide, check with `validate`, write.

    Args:
        ask: reads one answer; a test gives its own.
        choose: shows a menu and returns the index of the choice; by default accelerate's, on a terminal.
    """
    from hf_fsdp_qlora.accelerate_config import Answers, check_free, launch_command, recommend, write_files
    from hf_fsdp_qlora.memory_settings import GIB
    from hf_fsdp_qlora.validation import validate

    if not args.overwrite:
        check_free(args.accelerate_config, args.recipe)
    if choose is None and ask is input and sys.stdin.isatty() and sys.stdout.isatty():
        choose = arrow_keys
    values = _answers(args, None if args.yes else ask, choose)
    shape = values.pop("model")
    answers = Answers(
        model=shape.name,
        gpu_memory_gib=values.pop("gpu_memory") / GIB,
        host_memory_gib=values.pop("host_memory") / GIB,
        lora_r=args.lora_r,
        output_dir=args.output_dir,
        **values,
    )
    recommendation = recommend(answers, shape)
    memory = int(answers.gpu_memory_gib * GIB) if answers.gpus else None
    validate(recommendation.accelerate, recommendation.recipe, gpu_memory_bytes=memory)
    write_files(recommendation, args.accelerate_config, args.recipe, overwrite=args.overwrite)
    print("\n".join(recommendation.reasons))
    print(f"Wrote {args.accelerate_config} and {args.recipe}. Start with:")
    print(launch_command(recommendation, args.accelerate_config, args.recipe))
    return 0


def machine_defaults() -> dict[str, str]:
    """What can be read off this machine: GPUs, the memory of the smallest card, host memory, cores."""
    import psutil
    import torch

    gpus = torch.cuda.device_count()
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(gpus)]
    return {
        "gpus": str(gpus),
        "gpu_memory": f"{min(sizes, default=0) / 2**30:.1f}GiB",
        "host_memory": f"{psutil.virtual_memory().total / 2**30:.1f}GiB",
        "cores": str(len(os.sched_getaffinity(0))),
        "dataset": DEFAULT_DATASET,
        "seq_len": "2048",
        "goal": next(iter(GOALS)),
    }


def arrow_keys(title: str, choices: Sequence[str], default: int) -> int:
    """accelerate's menu. Returns the index of the choice."""
    from accelerate.commands.menu import BulletMenu

    return BulletMenu(title, list(choices)).run(default_choice=default)


def _questions(*, trust_remote_code: bool) -> dict[str, Question]:
    """By flag, in the order in which they are asked."""
    from hf_fsdp_qlora.commands.estimate import parse_size

    def model(text: str) -> Any:
        from hf_fsdp_qlora.model_shape import model_shape

        if not text:
            raise ConfigError("No model. Give --model: a hub id or a folder.")
        return model_shape(text, trust_remote_code=trust_remote_code)

    return {
        "model": Question("Model (hub id or folder)", model),
        "dataset": Question("Data set (hub id or file)", str),
        "gpus": Question("GPUs of this machine (0 for CPU only)", lambda text: _whole(text, "gpus")),
        "gpu_memory": Question("Memory of one card, such as 24GiB", parse_size),
        "host_memory": Question("Memory of this machine, such as 128GiB", parse_size),
        "cores": Question("CPU cores of this machine", lambda text: max(1, _whole(text, "cores"))),
        "seq_len": Question("Tokens of a sequence", lambda text: _whole(text, "seq_len")),
        "goal": Question("Goal", _goal, {goal.name: goal.title for goal in GOALS.values()}),
    }


def _answers(args: argparse.Namespace, ask: Ask | None, choose: Choose | None) -> dict[str, Any]:
    """A value for every question: the flag's, else the answer, else the machine's."""
    defaults: dict[str, str] | None = None
    found: dict[str, Any] = {}
    for name, question in _questions(trust_remote_code=args.trust_remote_code).items():
        given = getattr(args, name)
        if given is None and name == "gpu_memory" and found["gpus"] == 0:
            given = "0"
        if given is not None:
            found[name] = question.read(given)
            continue
        defaults = defaults or machine_defaults()
        default = defaults.get(name, "")
        if name == "seq_len" and found["model"].max_positions:
            default = str(min(int(default), found["model"].max_positions))
        if ask is None:
            found[name] = question.read(default)
        elif choose is not None and question.choices:
            names = list(question.choices)
            found[name] = names[choose(question.text, list(question.choices.values()), names.index(default))]
        else:
            found[name] = _ask_until_read(question, default, ask)
    return found


def _ask_until_read(question: Question, default: str, ask: Ask) -> Any:
    for name, title in (question.choices or {}).items():
        print(f"  {name}: {title}")
    while True:
        try:
            answer = ask(f"{question.text}{f' [{default}]' if default else ''}: ")
        except EOFError:
            raise ConfigError(
                f"No answer to {question.text!r}. Give the flags, or --yes to take this machine's values."
            ) from None
        try:
            return question.read(answer.strip() or default)
        except ConfigError as error:
            print(f"  {error}")


def _goal(text: str) -> str:
    if text not in GOALS:
        raise ConfigError(f"goal={text!r} is unknown; use one of {', '.join(GOALS)}.")
    return text


def _whole(text: str, name: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} is no whole number.")
    return int(text)
