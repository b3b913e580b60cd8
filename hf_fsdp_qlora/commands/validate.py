"""`hf-fsdp-qlora validate`: everything that is wrong with an accelerate config and a recipe, at once."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser("validate", help="check an accelerate config and a recipe", allow_abbrev=False)
    parser.add_argument("--accelerate_config", "--accelerate-config", required=True, help="file or shipped name")
    parser.add_argument("--config", required=True, help="recipe: file or shipped name")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of one card, such as 24GiB, to check the peak")
    parser.add_argument("--json", action="store_true", help="as JSON, for a program")


def run(args: argparse.Namespace) -> int:
    """Print all problems. Exit status 1 if there are any."""
    from hf_fsdp_qlora.commands.estimate import parse_size
    from hf_fsdp_qlora.validation import find_problems

    gpu_memory = None if args.gpu_memory is None else parse_size(args.gpu_memory)
    findings = find_problems(args.accelerate_config, args.config, gpu_memory_bytes=gpu_memory)
    if args.json:
        print(json.dumps(asdict(findings), indent=2, default=str))
    else:
        for problem in findings.problems:
            print(f"- {problem}")
        for note in findings.not_checked:
            print(f"not checked: {note}")
        print(f"{len(findings.problems)} problems" if findings.problems else "no problems found")
    return 1 if findings.problems else 0
