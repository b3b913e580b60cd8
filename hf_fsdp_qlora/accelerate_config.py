"""From a few answers to an accelerate config and a recipe that work together, with the reasons.

The planner decides: of the ways to place the model on the cards, the fastest that fits is taken, and then the largest
batch that fits, or what compiled_choice.py finds where layers can be compiled. "Fastest" is an order, not a
measurement: one GPU or DDP gather nothing, FSDP2 gathers layers, offload moves them over PCIe in every step. Asking
questions is commands/config.py's part.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from hf_fsdp_qlora.compiled_choice import choose_compiled
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.goals import GOALS, Goal
from hf_fsdp_qlora.memory import MemoryEstimate, estimate_memory
from hf_fsdp_qlora.memory_settings import GIB, MemorySettings
from hf_fsdp_qlora.model_shape import ModelShape
from hf_fsdp_qlora.planning import largest_batch_size

GLOBAL_BATCH_SIZE = 16  # sequences per optimizer step, as in QLoRA's own settings
CPU_PROCESSES = 2


@dataclass(frozen=True)
class Answers:
    """What the wizard knows.

    Attributes:
        model: hub id or folder.
        dataset: hub id or file.
        gpus: GPUs of this machine; 0 means CPU only.
        gpu_memory_gib: of one card.
        host_memory_gib: of the machine.
        cores: CPU cores of the machine.
        seq_len: tokens of a sequence.
        goal: a name in `GOALS`.
        output_dir: where the run will write.
    """

    model: str
    dataset: str
    gpus: int
    gpu_memory_gib: float
    host_memory_gib: float
    cores: int = 2
    seq_len: int = 2048
    goal: str = "qlora"
    lora_r: int = 16
    output_dir: str = "outputs/run"


@dataclass(frozen=True)
class Recommendation:
    """Two files' contents and why they are so.

    Attributes:
        peak_bytes: predicted for one process.
        threads: for each process, on a machine without GPUs; None leaves them alone.
    """

    accelerate: dict[str, Any]
    recipe: dict[str, Any]
    reasons: tuple[str, ...]
    peak_bytes: int
    threads: int | None = None


def recommend(answers: Answers, shape: ModelShape) -> Recommendation:
    """Choose engine, offload and batch size.

    Raises:
        ConfigError: an answer makes no sense, or the model fits in no way the planner knows.
    """
    _check(answers, shape)
    rejected = []
    for settings, name in _placements(answers, shape):
        problem = _problem(answers, estimate_memory(shape, settings))
        if problem:
            rejected.append(f"{name} {problem}")
        elif answers.gpus == 0:
            return _recommendation(answers, shape, settings, [*rejected, f"{name} fits. {_cpu_note(answers)}"])
        else:
            return _on_gpus(answers, shape, settings, rejected, name)
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
    if not overwrite:
        check_free(accelerate_path, recipe_path)
    header = "".join(f"# {reason}\n" for reason in recommendation.reasons)
    command = f"# {launch_command(recommendation, accelerate_path, recipe_path)}\n"
    for path, values in ((accelerate_path, recommendation.accelerate), (recipe_path, recommendation.recipe)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + command + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def check_free(*paths: Path) -> None:
    """Raise a ConfigError if a file exists."""
    existing = [str(path) for path in paths if path.exists()]
    if existing:
        raise ConfigError(f"{', '.join(existing)} exists. Give other names, or --overwrite.")


def launch_command(recommendation: Recommendation, accelerate_path: Path, recipe_path: Path) -> str:
    """What starts the run, from a checkout as from an installed package. On a CPU the threads of a process are set
    too: accelerate sets one, and its config file has no key for it."""
    threads = [f"OMP_NUM_THREADS={recommendation.threads}"] if recommendation.threads else []
    files = ["--accelerate_config", str(accelerate_path), "--config", str(recipe_path)]
    return shlex.join([*threads, "hf-fsdp-qlora", "train", *files])


def build_accelerate_config(engine: str, *, num_processes: int, offload: str, use_cpu: bool) -> dict[str, Any]:
    """The contents of a file that `accelerate launch --config_file` reads, for one machine."""
    config: dict[str, Any] = dict(
        compute_environment="LOCAL_MACHINE",
        distributed_type={"none": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}[engine],
        num_machines=1, num_processes=num_processes, machine_rank=0, main_process_port=0,  # any that is free
        main_training_function="main",
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
    if answers.gpus < 0 or answers.gpu_memory_gib < 0 or answers.seq_len < 1 or answers.lora_r < 1:
        raise ConfigError(f"gpus, memory, sequence length and rank must be positive, got {answers}.")
    if answers.gpus and not answers.gpu_memory_gib:
        raise ConfigError(f"{answers.gpus} GPUs, but no memory of a card. Give --gpu-memory, such as 24GiB.")
    if shape.max_positions and answers.seq_len > shape.max_positions:
        raise ConfigError(f"seq_len={answers.seq_len}, but {answers.model} has {shape.max_positions} positions.")


def _placements(answers: Answers, shape: ModelShape) -> list[tuple[MemorySettings, str]]:
    """Ways to place the model, fastest first, each with how a sentence about it begins."""
    goal = GOALS[answers.goal]
    base = MemorySettings(
        engine="fsdp2", gpus=answers.gpus or CPU_PROCESSES, seq_len=answers.seq_len, lora_r=answers.lora_r,
        dtype="bfloat16" if answers.gpus else "float32",
        gradient_accumulation_steps=2,  # gradients may have to stay between micro-batches
        **goal.planner,
    )  # fmt: skip
    if answers.gpus == 0:
        one = replace(base, gradient_accumulation_steps=1)
        return [(one, "No GPU: two CPU processes with gloo, sharded by FSDP2, in float32,")]
    if answers.gpus == 1:
        ways = [(replace(base, engine="none"), "The whole model on the card")]
    else:
        ways = [(replace(base, engine="ddp"), "DDP, the whole model on every card,"), (base, "FSDP version 2")]
    if answers.gpus > 1 and goal.has_adapter and shape.head_numel:
        whole = replace(base, replicate_head=True, embedding_on_host=True)
        ways.append((whole, "FSDP version 2 with the head whole on every card and the embedding in host memory"))
    names = {"base": "quantised rows", "all": "all parameters"}
    offloaded = [(replace(base, offload=what), f"FSDP version 2 with {names[what]} in host memory")
                 for what in goal.offloads]  # fmt: skip
    return [*ways, *offloaded]


def _problem(answers: Answers, estimate: MemoryEstimate) -> str | None:
    """Why a placement is impossible, as the rest of a sentence."""
    card, available = answers.gpu_memory_gib * GIB, answers.host_memory_gib * GIB
    if answers.gpus and not estimate.fits(card):
        return f"needs {estimate.needed_bytes / GIB:.1f} GiB a card, it has {card / GIB:.1f}."
    host = estimate.host_needed_bytes + (0 if answers.gpus else estimate.peak_bytes * estimate.settings.gpus)
    if host > available:
        return f"needs {host / GIB:.1f} GiB of host memory, there are {available / GIB:.1f}."
    return None


def _on_gpus(
    answers: Answers, shape: ModelShape, settings: MemorySettings, reasons: list[str], name: str
) -> Recommendation:
    """The batch for a placement that fits, and whether layers are compiled."""
    card = answers.gpu_memory_gib * GIB
    limit = max(1, GLOBAL_BATCH_SIZE // settings.gpus)
    compiled, compiling = choose_compiled(shape, settings, card, largest_batch=limit)
    batch_size = compiled.batch_size if compiled else _batch_size(shape, settings, card)
    steps = max(1, GLOBAL_BATCH_SIZE // (batch_size * answers.gpus))
    chosen = compiled or replace(settings, batch_size=batch_size, padded=batch_size > 1)
    chosen = replace(chosen, gradient_accumulation_steps=steps)
    needed = estimate_memory(shape, chosen).needed_bytes / GIB
    reasons.append(f"{name} fits: {needed:.1f} of {card / GIB:.1f} GiB a card at batch {batch_size}.")
    size = "a power of two" if compiled else "the largest power of two that fits with padding"
    reasons.append(
        f"Batch {batch_size}: {size}, at most {GLOBAL_BATCH_SIZE} over all GPUs. Accumulation steps {steps}: the "
        f"optimizer sees {batch_size * steps * answers.gpus} sequences a step."
    )
    reasons += [compiling] if compiling else []
    if settings.engine == "fsdp2":
        reasons.append("FSDP version 2, not 1: with 1 the first process holds the whole model while it loads.")
    return _recommendation(answers, shape, chosen, reasons)


def _cpu_note(answers: Answers) -> str:
    return f"Threads for each process: {_threads(answers)}. For trying things out; expect patience."


def _threads(answers: Answers) -> int:
    return max(1, answers.cores // CPU_PROCESSES)


def _batch_size(shape: ModelShape, settings: MemorySettings, card_bytes: float) -> int:
    """The largest power of two that fits with padding, so that the global batch divides evenly."""
    largest = largest_batch_size(shape, replace(settings, padded=True), card_bytes)
    limit = max(1, min(largest, GLOBAL_BATCH_SIZE // settings.gpus))
    return 1 << (limit.bit_length() - 1)


def _recommendation(
    answers: Answers, shape: ModelShape, settings: MemorySettings, reasons: list[str]
) -> Recommendation:
    use_cpu = answers.gpus == 0
    accelerate = build_accelerate_config(
        settings.engine, num_processes=settings.gpus, offload=settings.offload, use_cpu=use_cpu
    )
    goal = GOALS[answers.goal]
    recipe: dict[str, Any] = dict(
        model_name_or_path=answers.model, dtype=settings.dtype, **goal.recipe,
        **(dict(offload="base") if settings.offload == "base" else {}),
        **(dict(replicate_head=True, embedding_on_host=True) if settings.replicate_head else {}),
        **_adapter_keys(goal, answers), **_compiling_keys(settings),
        dataset_name=answers.dataset, dataset_train_split="train", max_length=answers.seq_len, packing=False,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        gradient_checkpointing=True, learning_rate=goal.learning_rate, lr_scheduler_type="cosine", num_train_epochs=1,
        max_grad_norm=1.0, bf16=not use_cpu, save_strategy="epoch", logging_steps=10, report_to="none",
        output_dir=answers.output_dir, seed=42, **(dict(use_cpu=True) if use_cpu else {}),
    )  # fmt: skip
    peak = estimate_memory(shape, settings).peak_bytes
    return Recommendation(accelerate, recipe, tuple(reasons), peak, _threads(answers) if use_cpu else None)


def _compiling_keys(settings: MemorySettings) -> dict[str, Any]:
    if not settings.compile_layers:
        return {}
    return dict(compile_layers=True, activation_budget=settings.activation_budget)


def _adapter_keys(goal: Goal, answers: Answers) -> dict[str, Any]:
    if not goal.has_adapter:
        return {}
    return dict(use_peft=True, lora_r=answers.lora_r, lora_alpha=2 * answers.lora_r, lora_dropout=0.0,
                lora_target_modules="all-linear")  # fmt: skip
