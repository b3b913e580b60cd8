"""`hf-fsdp-qlora config`: ask a few questions, or take flags, and write an accelerate config and a recipe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_fsdp_qlora.errors import ConfigError

DEFAULT_DATASET = "HuggingFaceH4/no_robots"
QUESTIONS = {
    "model": "Model (hub id or folder)",
    "dataset": "Data set (hub id or file)",
    "gpus": "GPUs of this machine (0 for CPU only)",
    "gpu_memory": "Memory of one card",
    "host_memory": "Memory of this machine",
    "seq_len": "Tokens of a sequence",
    "goal": "Goal: qlora (4-bit base) or lora (16-bit base)",
}


def register(subparsers: Any) -> None:
    """Add the command and its options; what is not given is asked for, or taken from the machine with --yes."""
    parser = subparsers.add_parser("config", help="write an accelerate config and a recipe", allow_abbrev=False)
    parser.add_argument("--model", help=QUESTIONS["model"])
    parser.add_argument("--dataset", help=QUESTIONS["dataset"])
    parser.add_argument("--gpus", type=int, help=QUESTIONS["gpus"])
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of one card, such as 24GiB")
    parser.add_argument("--host-memory", metavar="SIZE", help="memory of the machine, such as 128GiB")
    parser.add_argument("--seq-len", type=int, help=QUESTIONS["seq_len"])
    parser.add_argument("--goal", choices=("qlora", "lora"), help="4-bit or 16-bit base")
    parser.add_argument("--lora-r", type=int, default=16, help="rank")
    parser.add_argument("--output-dir", default="outputs/run", help="where the run will write")
    parser.add_argument("--accelerate-config", type=Path, default=Path("accelerate.yaml"), help="file to write")
    parser.add_argument("--recipe", type=Path, default=Path("recipe.yaml"), help="file to write")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the repository")
    parser.add_argument("--yes", action="store_true", help="ask nothing; take the machine's values")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def run(args: argparse.Namespace, ask: Callable[[str], str] = input) -> int:
    """Ask, decide, check with `validate`, write.

    Args:
        ask: reads one answer; a test gives its own.
    """
    from hf_fsdp_qlora.accelerate_config import Answers, recommend, write_files
    from hf_fsdp_qlora.commands.estimate import parse_size
    from hf_fsdp_qlora.memory_settings import GIB
    from hf_fsdp_qlora.model_shape import model_shape
    from hf_fsdp_qlora.validation import validate

    values = _answers(args, ask)
    answers = Answers(
        model=values["model"],
        dataset=values["dataset"],
        gpus=_whole(values["gpus"], "gpus"),
        gpu_memory_gib=parse_size(values["gpu_memory"]) / GIB,
        host_memory_gib=parse_size(values["host_memory"]) / GIB,
        seq_len=_whole(values["seq_len"], "seq_len"),
        goal=values["goal"],
        lora_r=args.lora_r,
        output_dir=args.output_dir,
    )
    shape = model_shape(answers.model, trust_remote_code=args.trust_remote_code)
    recommendation = recommend(answers, shape)
    memory = int(answers.gpu_memory_gib * GIB) if answers.gpus else None
    validate(recommendation.accelerate, recommendation.recipe, gpu_memory_bytes=memory)
    write_files(recommendation, args.accelerate_config, args.recipe, overwrite=args.overwrite)
    print("\n".join(recommendation.reasons))
    print(f"Wrote {args.accelerate_config} and {args.recipe}. Start with:")
    print(f"accelerate launch --config_file {args.accelerate_config} recipes/sft.py --config {args.recipe}")
    return 0


def machine_defaults() -> dict[str, str]:
    """What can be read off this machine: GPUs, the memory of the smallest card, host memory."""
    import torch

    gpus = torch.cuda.device_count()
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(gpus)]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "gpus": str(gpus),
        "gpu_memory": f"{min(sizes, default=0) / 2**30:.1f}GiB",
        "host_memory": f"{host / 2**30:.1f}GiB",
        "dataset": DEFAULT_DATASET,
        "seq_len": "2048",
        "goal": "qlora",
    }


def _answers(args: argparse.Namespace, ask: Callable[[str], str]) -> dict[str, str]:
    values = {name: getattr(args, name) for name in QUESTIONS}
    if all(value is not None for value in values.values()):
        return {name: str(value) for name, value in values.items()}
    defaults = machine_defaults()
    interactive = not args.yes and (ask is not input or sys.stdin.isatty())
    found: dict[str, str] = {}
    for name, question in QUESTIONS.items():
        default = defaults.get(name, "")
        if values[name] is not None:
            found[name] = str(values[name])
        elif found.get("gpus") == "0" and name == "gpu_memory":
            found[name] = "0"
        elif interactive:
            found[name] = ask(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        else:
            found[name] = default
    if not found["model"]:
        raise ConfigError("No model. Give --model.")
    return found


def _whole(text: str, name: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} is no whole number.")
    return int(text)
