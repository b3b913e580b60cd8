"""`hf-fsdp-qlora expand`: add decoder layers that change nothing until they are trained (LLaMA Pro)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "expand", help="add decoder layers that change nothing yet",
        description="Add identity-initialised decoder layers to a model, tensor by tensor (LLaMA Pro).",
    )  # fmt: skip
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("output", help="folder to create; it must not exist or be empty")
    parser.add_argument("--new-layers", type=int, required=True, metavar="N", help="how many to add, spread evenly")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="bytes of one file, in 10**9 (default: 5)")
    parser.add_argument("--revision", help="revision of the model on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")


def run(args: argparse.Namespace) -> int:
    """Expand and print what was added."""
    from hf_fsdp_qlora.expand import RECORD_NAME, expand_checkpoint

    expansion = expand_checkpoint(
        args.model, args.output, new_layers=args.new_layers, max_shard_bytes=int(args.max_shard_gb * 1e9),
        revision=args.revision, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    if args.json:
        print(json.dumps({"output": args.output, **asdict(expansion)}, indent=2))
        return 0
    new = ", ".join(f"{expansion.layers}.{index}" for index in expansion.new_layers)
    print(
        f"Expanded {expansion.base_model} to {expansion.num_layers} layers: {args.output}\n"
        f"  new    {new} (also in {RECORD_NAME})\n"
        f"  zero   {' and '.join(expansion.zeroed)} of the new layers"
    )
    return 0
