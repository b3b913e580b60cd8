"""`hf-fsdp-qlora quantize`: write a model in bitsandbytes 4 bits, once, tensor by tensor."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")


def register(subparsers: Any) -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "quantize", help="write a model in 4 bits, tensor by tensor",
        description="Write a model in bitsandbytes 4 bits, as stock transformers would, without holding it in memory.",
    )  # fmt: skip
    parser.add_argument("model", help="hub id or folder of the original model")
    parser.add_argument("output", help="folder to create; it must not exist or be empty")
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), default="nf4", help="default: nf4")
    parser.add_argument("--double-quant", action="store_true", help="quantise the absmax values too")
    parser.add_argument("--block-size", type=int, default=64, help="weights under one absmax (default: 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="cast to this first (default: bfloat16)")
    parser.add_argument("--skip-modules", nargs="+", metavar="NAME", help="linear layers to leave in --dtype")
    parser.add_argument("--device", default="cpu", help="where tensors are quantised: cpu or cuda")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="bytes of one file, in 10**9 (default: 5)")
    parser.add_argument("--revision", help="revision of the model on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Quantise and print what was written."""
    import torch

    from hf_fsdp_qlora.quantization import BlockwiseFourBitConfig
    from hf_fsdp_qlora.quantize_checkpoint import quantize_checkpoint

    dtype = getattr(torch, args.dtype)
    config = BlockwiseFourBitConfig(
        args.block_size, bnb_4bit_quant_type=args.quant_type, bnb_4bit_use_double_quant=args.double_quant,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=args.skip_modules,
    )  # fmt: skip
    report = quantize_checkpoint(
        args.model, args.output, quantization_config=config, dtype=dtype, device=args.device,
        max_shard_bytes=int(args.max_shard_gb * 1e9), revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    if args.json:
        print(json.dumps(asdict(report), indent=2))
        return 0
    print(
        f"Quantised {report.source}\n"
        f"  to     {report.output}, {report.total_bytes / 2**30:.3f} GiB in {report.seconds:.0f} s\n"
        f"  {report.num_quantized} weights in {8 * report.bytes_per_weight:.2f} bits per weight, "
        f"{report.num_unquantized} tensors in {args.dtype}\n"
        f"  linear layers that were not quantised: {', '.join(report.unquantized_linears) or 'none'}"
    )
    return 0
