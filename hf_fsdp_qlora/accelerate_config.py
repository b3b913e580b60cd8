"""From a few answers to an accelerate config and a recipe that work together, with the reasons.

The planner decides: of the ways to place the model on the cards, the fastest that fits is taken, and then the largest
batch that fits. "Fastest" is an order, not a measurement: one GPU or DDP gather nothing, FSDP2 gathers layers, offload
moves them over PCIe in every step. Asking questions is commands/config.py's part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.memory_settings import GIB, MemorySettings
from hf_fsdp_qlora.model_shape import ModelShape
from hf_fsdp_qlora.planning import largest_batch_size

GOALS = ("qlora", "lora")
GLOBAL_BATCH_SIZE = 16  # sequences per optimizer step, as in QLoRA's own settings
MAX_BATCH_SIZE = 16
CPU_PROCESSES = 2


@dataclass(frozen=True)
class Answers:
    """What the wizard knows.

    Attributes:
        model: hub id or folder.
        dataset: hub id or file.
        gpus: GPUs of this machine; 0 means CPU only.
        gpu_memory_gib: of one card.
        host_memory_gib: of the machine; limits offload.
        seq_len: tokens of a sequence.
        goal: "qlora" (4-bit base) or "lora" (16-bit base).
        output_dir: where the run will write.
    """

    model: str
    dataset: str
    gpus: int
    gpu_memory_gib: float
    host_memory_gib: float
    seq_len: int = 2048
    goal: str = "qlora"
    lora_r: int = 16
    output_dir: str = "outputs/run"


@dataclass(frozen=True)
class Recommendation:
    """Two files' contents and why they are so."""

    accelerate: dict[str, Any]
    recipe: dict[str, Any]
    reasons: tuple[str, ...]
    peak_bytes: int


def recommend(answers: Answers, shape: ModelShape) -> Recommendation:
    """Choose engine, offload and batch size.

    Raises:
        ConfigError: an answer makes no sense, or the model fits in no way the planner knows.
    """
    _check(answers, shape)
    if answers.gpus == 0:
        settings = MemorySettings(method=answers.goal, gpus=CPU_PROCESSES, dtype="float32", seq_len=answers.seq_len)
        settings = replace(settings, lora_r=answers.lora_r)
        reasons = ["No GPU: two CPU processes with gloo, in float32. For trying things out; expect patience."]
        return _recommendation(answers, shape, settings, reasons)
    card = answers.gpu_memory_gib * GIB
    rejected = []
    for settings, name in _placements(answers):
        estimate = estimate_memory(shape, settings)
        host = estimate.host["processes"] + max(estimate.host["pinned"], estimate.host["loading"])
        if not estimate.fits(card):
            rejected.append(f"{name} needs {estimate.needed_bytes / GIB:.1f} GiB a card, it has {card / GIB:.1f}.")
        elif host > answers.host_memory_gib * GIB:
            available = answers.host_memory_gib
            rejected.append(f"{name} needs {host / GIB:.1f} GiB of host memory, there are {available:.1f}.")
        else:
            batch_size = _batch_size(shape, settings, card)
            steps = max(1, GLOBAL_BATCH_SIZE // (batch_size * answers.gpus))
            chosen = replace(settings, batch_size=batch_size, padded=batch_size > 1, gradient_accumulation_steps=steps)
            needed = estimate_memory(shape, chosen).needed_bytes / GIB
            reasons = [*rejected, f"{name} fits: {needed:.1f} of {card / GIB:.1f} GiB a card at batch {batch_size}."]
            return _recommendation(answers, shape, chosen, reasons)
    raise ConfigError(
        f"{answers.model} at {answers.seq_len} tokens fits in no way:\n" + "\n".join(rejected)
        + "\nUse shorter sequences, more or larger GPUs, or a smaller model."
    )  # fmt: skip


def write_files(
    recommendation: Recommendation, accelerate_path: Path, recipe_path: Path, *, overwrite: bool = False
) -> None:
    """Write both files with the reasons as comments.

    Raises:
        ConfigError: a file exists and `overwrite` is false.
    """
    existing = [str(path) for path in (accelerate_path, recipe_path) if path.exists()]
    if existing and not overwrite:
        raise ConfigError(f"{', '.join(existing)} exists. Give other names, or --overwrite.")
    header = "".join(f"# {reason}\n" for reason in recommendation.reasons)
    command = f"# accelerate launch --config_file {accelerate_path} recipes/sft.py --config {recipe_path}\n"
    for path, values in ((accelerate_path, recommendation.accelerate), (recipe_path, recommendation.recipe)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + command + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def build_accelerate_config(engine: str, *, num_processes: int, offload: str, use_cpu: bool) -> dict[str, Any]:
    """The contents of a file that `accelerate launch --config_file` reads, for one machine."""
    config: dict[str, Any] = dict(
        compute_environment="LOCAL_MACHINE",
        distributed_type={"none": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}[engine],
        num_machines=1, num_processes=num_processes, machine_rank=0, main_training_function="main",
        mixed_precision="no" if use_cpu else "bf16", rdzv_backend="static", same_network=True, use_cpu=use_cpu,
        debug=False,
    )  # fmt: skip
    if engine == "fsdp2":
        config["fsdp_config"] = dict(
            fsdp_version=2, fsdp_auto_wrap_policy="NO_WRAP", fsdp_reshard_after_forward=True,
            fsdp_offload_params=offload == "all", fsdp_state_dict_type="FULL_STATE_DICT",
            fsdp_cpu_ram_efficient_loading=False, fsdp_activation_checkpointing=False,
        )  # fmt: skip
    return config


def _check(answers: Answers, shape: ModelShape) -> None:
    if answers.goal not in GOALS:
        raise ConfigError(f"goal={answers.goal!r} is unknown; use one of {', '.join(GOALS)}.")
    if answers.gpus < 0 or answers.gpu_memory_gib < 0 or answers.seq_len < 1:
        raise ConfigError(f"gpus, memory and sequence length must be positive, got {answers}.")
    if shape.max_positions and answers.seq_len > shape.max_positions:
        raise ConfigError(f"seq_len={answers.seq_len}, but {answers.model} has {shape.max_positions} positions.")


def _placements(answers: Answers) -> list[tuple[MemorySettings, str]]:
    """Ways to place the model, fastest first."""
    base = MemorySettings(
        method=answers.goal, engine="fsdp2", gpus=answers.gpus, seq_len=answers.seq_len, lora_r=answers.lora_r,
        gradient_accumulation_steps=2,  # gradients may have to stay between micro-batches
    )  # fmt: skip
    if answers.gpus == 1:
        whole = (replace(base, engine="none"), "The whole model on the card")
    else:
        whole = (replace(base, engine="ddp"), "DDP, the whole model on every card,")
    ways = [whole, (base, "FSDP2")] if answers.gpus > 1 else [whole]
    offloads = [(replace(base, offload="base"), "FSDP2 with quantised rows in host memory")]
    offloads.append((replace(base, offload="all"), "FSDP2 with all parameters in host memory"))
    return [*ways, *(offloads if answers.goal == "qlora" else offloads[1:])]


def _batch_size(shape: ModelShape, settings: MemorySettings, card_bytes: float) -> int:
    """The largest power of two that fits with padding, so that the global batch divides evenly."""
    largest = largest_batch_size(shape, replace(settings, padded=True), card_bytes)
    limit = max(1, min(largest, MAX_BATCH_SIZE, GLOBAL_BATCH_SIZE // settings.gpus))
    return 1 << (limit.bit_length() - 1)


def _recommendation(
    answers: Answers, shape: ModelShape, settings: MemorySettings, reasons: list[str]
) -> Recommendation:
    use_cpu = answers.gpus == 0
    accelerate = build_accelerate_config(
        settings.engine, num_processes=settings.gpus, offload=settings.offload, use_cpu=use_cpu
    )
    recipe: Mapping[str, Any] = dict(
        model_name_or_path=answers.model, dtype=settings.dtype,
        load_in_4bit=answers.goal == "qlora",
        **(dict(bnb_4bit_quant_type="nf4", use_bnb_nested_quant=True) if answers.goal == "qlora" else {}),
        **(dict(offload="base") if settings.offload == "base" else {}),
        use_peft=True, lora_r=answers.lora_r, lora_alpha=2 * answers.lora_r, lora_dropout=0.0,
        lora_target_modules="all-linear",
        dataset_name=answers.dataset, dataset_train_split="train", max_length=answers.seq_len, packing=False,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        gradient_checkpointing=True, learning_rate=2e-4, lr_scheduler_type="cosine", num_train_epochs=1,
        max_grad_norm=1.0, bf16=not use_cpu, save_strategy="epoch", logging_steps=10, report_to="none",
        output_dir=answers.output_dir, seed=42, **(dict(use_cpu=True) if use_cpu else {}),
    )  # fmt: skip
    peak = estimate_memory(shape, settings).peak_bytes
    return Recommendation(accelerate, dict(recipe), tuple(reasons), peak)
