"""`hf-fsdp-qlora train`: `recipes/sft.py` under `accelerate launch`, from an installed package as from a checkout."""

from __future__ import annotations

import argparse
import os
import sys

from hf_fsdp_qlora.config import load_recipe, parse_command_line
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.resources import accelerate_config_names, find_accelerate_config, find_recipe, sft_script
from hf_fsdp_qlora.validation import accelerate_values, validate


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "train",
        help="train a recipe",
        description="Train a recipe: accelerate launch [--config_file A] sft.py --config R [--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="R", help="a recipe: a YAML file or a shipped name")
    parser.add_argument(
        "--accelerate_config",
        metavar="A",
        help=f"an accelerate config: a YAML file or one of {', '.join(accelerate_config_names())}; without it, "
        "one process",
    )
    parser.add_argument("--num_processes", type=int, metavar="N", help="put over the accelerate config's number")


def run(args: argparse.Namespace) -> int | None:
    """Check the configs here, where a problem is one message and not one per rank, then become the training, so that
    signals reach it and its exit status is ours."""
    _, overrides = parse_command_line(["--config", args.config, *args.rest])
    recipe = load_recipe(args.config, overrides)
    if args.num_processes and not args.accelerate_config:
        raise ConfigError("--num_processes needs --accelerate_config, which says how the processes work together.")
    if args.accelerate_config:
        launched = dict(accelerate_values(args.accelerate_config))
        if args.num_processes:
            launched["num_processes"] = args.num_processes
        validate(launched, recipe)
    script = [str(sft_script()), "--config", str(find_recipe(args.config)), *args.rest]
    command = [sys.executable]
    if args.accelerate_config:
        command += ["-m", "accelerate.commands.launch"]
        command += ["--config_file", str(find_accelerate_config(args.accelerate_config))]
        if args.num_processes:
            command += ["--num_processes", str(args.num_processes)]
    os.execv(sys.executable, [*command, *script])
