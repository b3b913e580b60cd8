"""`hf-fsdp-qlora estimate`: memory per GPU, per host and on disk, from a model's config alone."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import fields
from typing import Any

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.memory_settings import (
    DTYPE_BYTES,
    ENGINES,
    GIB,
    METHODS,
    OFFLOADS,
    OPTIMIZER_STATE_BYTES,
    QUANT_FORMATS,
    ROTARY_FROZEN,
    MemorySettings,
)

_UNITS = {"gib": GIB, "mib": 2**20, "gb": 10**9}


def register(subparsers: Any) -> None:
    """Add the command and its options."""
    defaults = MemorySettings()
    parser = subparsers.add_parser(
        "estimate", help="how much memory a run needs", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="hub id or folder; only its config.json is read")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of one card, such as 24GiB")
    parser.add_argument("--host-memory", metavar="SIZE", help="memory of one node, such as 128GiB")
    parser.add_argument("--method", choices=METHODS, default=defaults.method, help="what is trained")
    parser.add_argument("--engine", choices=ENGINES, help="default: none on one GPU, fsdp2 on several")
    parser.add_argument("--gpus", type=int, default=defaults.gpus, help="per node")
    parser.add_argument("--nodes", type=int, default=defaults.nodes, help="nodes")
    parser.add_argument("--replicas", type=int, default=defaults.replicas, help="copies of the model (HSDP)")
    parser.add_argument("--offload", choices=OFFLOADS, default=defaults.offload, help="what lives in host memory")
    parser.add_argument("--replicate-head", action="store_true", help="head and final norm whole on every GPU")
    parser.add_argument("--embedding-on-host", action="store_true", help="input embedding in host memory")
    parser.add_argument("--seq-len", type=int, default=defaults.seq_len, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="sequences per GPU and step")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--no-gradient-checkpointing", dest="gradient_checkpointing", action="store_false",
                        help="keep every layer's activations")  # fmt: skip
    parser.add_argument("--activation-offloading", action="store_true", help="layers' inputs in host memory (TRL)")
    parser.add_argument("--compile-layers", action="store_true", help="compiled decoder layers; not under FSDP")
    parser.add_argument("--activation-budget", type=float, metavar="SHARE",
                        help="with --compile-layers: 0 keeps a layer's input, 1 all that is expensive")  # fmt: skip
    parser.add_argument("--padded", action="store_true", help="batches have padding")
    parser.add_argument("--lora-r", type=int, default=defaults.lora_r, help="rank")
    parser.add_argument("--lora-dropout", type=float, default=0.0, help="dropout before LoRA A")
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"], help="names, or all-linear")
    parser.add_argument("--modules-to-save", nargs="+", default=[], help="trained whole, such as lm_head")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZER_STATE_BYTES), default=defaults.optimizer, help="optim")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), default=defaults.dtype, help="compute dtype")
    parser.add_argument("--adapter-dtype", choices=tuple(DTYPE_BYTES), default=defaults.adapter_dtype, help="masters")
    parser.add_argument("--quant-format", choices=QUANT_FORMATS, default=defaults.quant_format, help="of the base")
    parser.add_argument("--block-size", type=int, help="weights under one scale; default: 64, for int8 128")
    parser.add_argument("--no-double-quant", dest="double_quant", action="store_false", help="float32 absmax")
    parser.add_argument("--prequantized", action="store_true", help="the checkpoint is in bitsandbytes 4 bits already")
    parser.add_argument("--new-layers", type=int, default=0, help="layers that `expand` added, for new_layers")
    parser.add_argument("--active-fraction", type=float, help="of the parameters, for rotary")
    parser.add_argument("--rotary-frozen", choices=ROTARY_FROZEN, default=defaults.rotary_frozen, help="parked format")
    parser.add_argument("--master-dtype", choices=("float32", "bfloat16"), default=defaults.master_dtype,
                        help="of rotary masters")  # fmt: skip
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the repository")
    parser.add_argument("--json", action="store_true", help="as JSON, for a program")


def run(args: argparse.Namespace) -> int:
    """Print the estimate. Exit status 1 if a card's memory was given and the run does not fit it, or its node."""
    from hf_fsdp_qlora.memory import estimate_memory
    from hf_fsdp_qlora.model_shape import model_shape
    from hf_fsdp_qlora.planning import cheapest_change, largest_batch_size, largest_seq_len

    settings = _settings(args)
    gpu_memory, host_memory = _size(args.gpu_memory), _size(args.host_memory)
    shape = model_shape(args.model, trust_remote_code=args.trust_remote_code)
    estimate = estimate_memory(shape, settings)
    answer: dict[str, Any] = {"model": args.model, **estimate.as_dict()}
    if gpu_memory is not None:
        fits = estimate.fits(gpu_memory, host_memory)
        answer["fits"] = fits
        answer["largest_batch_size"] = largest_batch_size(shape, settings, gpu_memory)
        answer["largest_seq_len"] = largest_seq_len(shape, settings, gpu_memory)
        change = None if fits else cheapest_change(shape, settings, gpu_memory, host_memory)
        answer["cheapest_change"] = change[0] if change else None
    print(json.dumps(answer, indent=2) if args.json else _describe(answer, gpu_memory, host_memory))
    return 0 if answer.get("fits", True) else 1


def parse_size(text: str) -> int:
    """Bytes of a size such as "24GiB", "80 GB" or "24576MiB"; a plain number is GiB.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    unit = (match[2].lower() or "gib") if match else ""
    if match is None or unit not in _UNITS:
        raise ConfigError(f"{text!r} is no memory size; write 24GiB, 80GB or 24576MiB.")
    return int(float(match[1]) * _UNITS[unit])


def _size(text: str | None) -> int | None:
    return None if text is None else parse_size(text)


def _settings(args: argparse.Namespace) -> MemorySettings:
    values = {item.name: getattr(args, item.name) for item in fields(MemorySettings)}
    if values["engine"] is None:
        values["engine"] = "none" if args.gpus * args.nodes == 1 and args.offload == "none" else "fsdp2"
    targets = values["target_modules"]
    values["target_modules"] = "all-linear" if targets == ["all-linear"] else tuple(targets)
    values["modules_to_save"] = tuple(values["modules_to_save"])
    return MemorySettings(**values)


def _describe(answer: dict[str, Any], gpu_memory: int | None, host_memory: int | None) -> str:
    settings = answer["settings"]
    lines = [
        f"{answer['model']}: {answer['total_parameters'] / 1e9:.2f} billion parameters, "
        f"{answer['trainable_parameters'] / 1e6:.1f} million trained",
        f"{settings['method']}, {settings['engine']}, {settings['nodes']} x {settings['gpus']} GPUs, batch "
        f"{settings['batch_size']} x {settings['seq_len']} tokens{_describe_layers(settings)}",
        "",
        "per GPU",
        *(f"  {name.replace('_', ' '):28s}{_gib(size)}" for name, size in answer["gpu"].items() if size),
        f"  {'peak allocated':28s}{_gib(answer['peak_bytes'])}   ({answer['highest_moment']})",
        f"  {'driver, NCCL, fragments':28s}{_gib(answer['overhead_bytes'])}",
        f"  {'needed':28s}{_gib(answer['needed_bytes'])}",
        f"  {'peak while loading':28s}{_gib(answer['loading_peak_bytes'])}",
        "per node",
        *(f"  {name:28s}{_gib(size)}" for name, size in answer["host"].items() if size),
        f"  {'needed':28s}{_gib(answer['host_needed_bytes'])}",
        "on disk",
        *(f"  {name.replace('_', ' '):28s}{_gib(size)}" for name, size in answer["disk"].items()),
    ]
    other = answer["activations_other_bytes"] / GIB
    if settings["activation_budget"] is not None:
        lines.append(f"Activations with gradient checkpointing in place of the budget: {other:.2f} GiB")
    else:
        with_it = "without" if settings["gradient_checkpointing"] else "with"
        lines.append(f"Activations {with_it} gradient checkpointing: {other:.2f} GiB")
    if gpu_memory is not None:
        verdict = "fits" if answer["fits"] else "DOES NOT FIT"
        node = f" in a node of {host_memory / GIB:.1f} GiB" if host_memory is not None else ""
        largest = f"largest batch at this length {answer['largest_batch_size']}"
        longest = f"longest sequence at this batch {answer['largest_seq_len']}"
        lines.append(f"{verdict} a card of {gpu_memory / GIB:.1f} GiB{node}; {largest}, {longest}.")
        if not answer["fits"]:
            lines.append(f"Cheapest change that fits: {answer['cheapest_change'] or 'none that the planner knows'}.")
    return "\n".join(lines)


def _describe_layers(settings: dict[str, Any]) -> str:
    if not settings["compile_layers"]:
        return ""
    budget = settings["activation_budget"]
    return ", compiled layers" + (f" with an activation budget of {budget:g}" if budget is not None else "")


def _gib(size: int) -> str:
    return f"{size / GIB:9.2f} GiB"
