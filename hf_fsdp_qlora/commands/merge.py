"""`hf-fsdp-qlora merge`: merge a saved adapter into its base model, shard by shard."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")


def register(subparsers: Any) -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "merge", help="merge an adapter into its base model", description="Merge an adapter into its base model."
    )
    parser.add_argument("adapter", help="PEFT adapter directory (LoRA, rsLoRA, DoRA)")
    parser.add_argument("--output", required=True, help="folder to create; it must not exist or be empty")
    parser.add_argument("--base-model", help="hub id or folder of the 16-bit base (default: what the adapter names)")
    parser.add_argument(
        "--into", choices=("original", "dequantized"), default="original",
        help="add the adapter to the checkpoint's own weights, or to what training dequantised them to",
    )  # fmt: skip
    parser.add_argument(
        "--quant-type", choices=("nf4", "fp4"), help="4-bit type of training, where the adapter does not record it"
    )
    parser.add_argument("--double-quant", action="store_true", help="training used double quantisation")
    parser.add_argument("--block-size", type=int, default=64, help="weights under one absmax in training")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the result (default: the checkpoint's)")
    parser.add_argument("--device", default="cpu", help="where the arithmetic runs: cpu or cuda")
    parser.add_argument("--revision", help="revision of the base model on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the base's repository")
    parser.add_argument("--text", type=Path, metavar="FILE", help="report loss and KL divergence on this text")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Merge, compare if asked to, and print what was done."""
    import torch

    from hf_fsdp_qlora.merge import merge_adapter

    # Read first: a wrong path must not surface after an hour of merging.
    text = None if args.text is None else args.text.read_text()
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    quantization_config = _quantization_config(args, dtype)
    report = merge_adapter(
        args.adapter, args.output, base_model=args.base_model, into=args.into,
        quantization_config=quantization_config if args.into == "dequantized" else None, dtype=dtype,
        device=args.device, revision=args.revision, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    answer = asdict(report)
    if text is not None:
        from hf_fsdp_qlora.merge_check import compare_merged

        if quantization_config is None:
            quantization_config, dtype = _recorded(args.adapter, dtype)
        answer["unmerged_base"] = "16 bit" if quantization_config is None else "as trained, in 4 bits"
        comparison = compare_merged(
            args.output, args.adapter, text, base_model=report.base_model, quantization_config=quantization_config,
            dtype=dtype, device=args.device, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
        answer["comparison"] = asdict(comparison)
    print(json.dumps(answer, indent=2) if args.json else _describe(answer))
    return 0


def _quantization_config(args: argparse.Namespace, dtype: Any) -> Any:
    """The config that the command line describes, None where it leaves that to the adapter's record. With `--into
    original` it serves the comparison only."""
    from hf_fsdp_qlora.errors import ConfigError

    if args.quant_type is None:
        if args.double_quant or args.block_size != 64:
            raise ConfigError("--double-quant and --block-size have no effect without --quant-type. Give it too.")
        return None
    if args.into == "original" and args.text is None:
        raise ConfigError("--quant-type has no effect with --into original unless --text asks for a comparison.")
    if args.block_size != 64 and args.text is not None:
        raise ConfigError("--text compares with stock transformers, which knows block size 64 only. Leave one out.")
    from transformers import BitsAndBytesConfig

    from hf_fsdp_qlora.quantization import BlockwiseFourBitConfig

    settings = dict(bnb_4bit_quant_type=args.quant_type, bnb_4bit_use_double_quant=args.double_quant)
    if args.block_size != 64:
        return BlockwiseFourBitConfig(bnb_4bit_blocksize=args.block_size, bnb_4bit_compute_dtype=dtype, **settings)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **settings)


def _recorded(adapter: str, dtype: Any) -> tuple[Any, Any]:
    """The config and dtype with which stock transformers loads the base as training did; (None, dtype) if the adapter
    has no record, or one of a format that stock transformers does not know."""
    from transformers import BitsAndBytesConfig

    from hf_fsdp_qlora.base_record import read_record

    record = read_record(Path(adapter))
    if record is None or type(record.quantization_config) is not BitsAndBytesConfig:
        return None, dtype
    record.quantization_config.bnb_4bit_compute_dtype = record.dtype
    return record.quantization_config, record.dtype


def _describe(answer: dict[str, Any]) -> str:
    lines = [
        f"Merged {answer['adapter']}",
        f"  into   {answer['into']}",
        f"  of     {answer['base_model']}",
        f"  output {answer['output']}",
        f"  {answer['num_low_rank']} tensors with a low-rank update, {answer['num_replaced']} replaced, "
        f"{answer['num_dequantized']} dequantised, {answer['num_copied']} copied",
    ]
    if answer["vocab_size"] is not None:
        lines.append(f"  vocabulary resized to {answer['vocab_size']}")
    if answer["untied_embeddings"]:
        lines.append("  embedding and head differ after the merge: tie_word_embeddings is now false")
    if "comparison" in answer:
        found = answer["comparison"]
        lines.append(
            f"  on {found['num_tokens']} tokens, the unmerged base {answer['unmerged_base']}: loss "
            f"{found['loss_unmerged']:.4f} unmerged, {found['loss_merged']:.4f} merged, "
            f"KL divergence {found['kl_divergence']:.2e} nats"
        )
    return "\n".join(lines)
