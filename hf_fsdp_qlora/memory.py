"""How much memory a run needs, before it is started: per GPU, per host and on disk. Arithmetic only.

The peak of a GPU is the sum of what is always there (its part of the weights and statistics, of what is trained, and
of the optimizer state) and of the highest moment of a step: activations (activations.py lists them term by term), what
the engine gathers just then (memory_gathered.py), and the gradients that are there by then; memory_step.py adds them
up. Rotary training is planned for its most expensive visit (memory_visits.py), which may come long after the first.
The loading peak is in memory_loading.py, host and disk in memory_host.py.

`peak_bytes` predicts `torch.cuda.max_memory_allocated()`. What the driver, NCCL and the allocator's fragmentation take
beside it is `overhead_bytes`; a run fits if the sum of both does.

Compiled layers are in memory_compiled.py.

Left out: model parallelism, evaluation with generation.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_fsdp_qlora.memory_host import disk_bytes, host_bytes
from hf_fsdp_qlora.memory_loading import loading_bytes
from hf_fsdp_qlora.memory_settings import GIB, MemorySettings, trainable_parameters
from hf_fsdp_qlora.memory_step import activations_of_step, moments_of_step, on_gpu, static_bytes
from hf_fsdp_qlora.memory_visits import Visit, rotary_visits
from hf_fsdp_qlora.model_shape import ModelShape, model_shape

CONTEXT_BYTES = int(0.55 * GIB)  # CUDA context with the kernels that a run loads
NCCL_BYTES = int(0.35 * GIB)  # NCCL's own buffers, with more than one GPU
FRAGMENTATION = 0.03  # of the peak
COMPILED_FRAGMENTATION = 0.04  # of it with compiled layers: 22.64 GiB were reserved for 21.84 (NOTES_speed.md)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by kind. `gpu` adds up to `peak_bytes`; `host` is per node; `disk` is per run.

    Attributes:
        gpu: weights, statistics, other_weights, replicated (a head that is whole), adapters (or what else is trained),
            gradients, buckets (DDP's),
            optimizer, gathered, activations, dequantized_and_passing, logits, workspace.
        loading_peak_bytes: highest while the model is loaded.
        peak_bytes: predicted `torch.cuda.max_memory_allocated()`.
        overhead_bytes: what the card holds beside it.
        highest_moment: where in the step the peak is.
        moments: the sum of `gpu` at every moment of the step; in rotary training of the most expensive visit's.
        trainable_parameters: in rotary training, at most at a time.
        activations_other_bytes: activations with checkpointing switched the other way, or in place of the budget.
    """

    settings: MemorySettings
    gpu: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    loading_peak_bytes: int
    peak_bytes: int
    overhead_bytes: int
    highest_moment: str
    moments: dict[str, int]
    activations_other_bytes: int
    trainable_parameters: int
    total_parameters: int

    @property
    def needed_bytes(self) -> int:
        """What a card must have, for training and for loading."""
        return max(self.peak_bytes, self.loading_peak_bytes) + self.overhead_bytes

    @property
    def host_needed_bytes(self) -> int:
        """What a node must have; offloaded tensors are pinned, so their rounded sizes count."""
        always = sum(self.host[name] for name in ("processes", "masters", "embedding", "activations"))
        return always + max(self.host["pinned"], self.host["loading"])

    def fits(self, gpu_memory_bytes: float, host_memory_bytes: float | None = None) -> bool:
        """Whether cards of that size are enough, and a node of that memory if it is given."""
        enough_host = host_memory_bytes is None or self.host_needed_bytes <= host_memory_bytes
        return self.needed_bytes <= gpu_memory_bytes and enough_host

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "needed_bytes": self.needed_bytes, "host_needed_bytes": self.host_needed_bytes}


def estimate_memory(
    model: str | os.PathLike[str] | ModelShape | Any, settings: MemorySettings | None = None, **changes: Any
) -> MemoryEstimate:
    """Predict a run's memory from the model's config alone.

    Args:
        model: a folder or hub id, a transformers config, or a `ModelShape`.
        settings: a run; `changes` are applied on top.
        method: "qlora" (4-bit base), "lora" (16-bit base), "full" (everything is trained, in `dtype`), "rotary"
            (`active_fraction` is trained, the rest is parked) or "new_layers" (`new_layers` of the layers, which
            `expand` added, over a 4-bit base).
        engine: "none", "ddp", "fsdp1" or "fsdp2".
        gpus, nodes: GPUs per node, and nodes.
        replicas: copies of the model that the GPUs hold together (HSDP, FSDP2 only).
        offload: "none"; "base" keeps quantised rows in host memory, "all" everything (FSDP).
        replicate_head, embedding_on_host: as in `load_model`; FSDP2 with adapters.
        dtype, adapter_dtype: of computation and unquantised weights; of trained adapters and layers.
        quant_format, block_size, double_quant: how the base is stored: "nf4", "fp4", "int8" or "hqq" (4 bits);
            by default in blocks of 64, int8 of 128.
        prequantized: the checkpoint is a bitsandbytes 4-bit folder.
        lora_r, lora_dropout, target_modules, modules_to_save: as in PEFT's LoraConfig.
        optimizer: transformers' name for it.
        batch_size, seq_len, gradient_accumulation_steps: per GPU.
        gradient_checkpointing: recompute each decoder layer in backward.
        activation_offloading: as in TRL's SFTConfig, with gradient_checkpointing.
        compile_layers, activation_budget: as in `load_model`; a budget takes the place of gradient_checkpointing.
            LoRA without dropout, not under FSDP, decoder layers like Llama's.
        padded: batches have padding, so attention gets a mask.
        active_fraction, rotary_frozen, master_dtype: as in RotaryConfig: the share of the parameters that is active
            (by default one block at a time), the format of parked linear layers, and the dtype of masters.

    Raises:
        ConfigError: a setting is unknown, or the planner does not know the model.
    """
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
    settings = replace(settings or MemorySettings(), **changes)
    shape = model if isinstance(model, ModelShape) else model_shape(model)
    visits: tuple[Visit | None, ...] = (None,)
    if settings.method == "rotary":
        visits = rotary_visits(shape, settings.active_fraction)
    steps = [moments_of_step(shape, settings, visit) for visit in visits]
    moments = max(steps, key=lambda step: max(_sums(step).values()))
    sums = _sums(moments)
    highest, peak = max(sums.items(), key=lambda item: item[1])
    static = static_bytes(shape, settings)
    has_budget = settings.activation_budget is not None
    other = replace(
        settings, gradient_checkpointing=has_budget or not settings.gradient_checkpointing, activation_budget=None,
        activation_offloading=False,
    )  # fmt: skip
    fragmentation = COMPILED_FRAGMENTATION if settings.compile_layers else FRAGMENTATION
    overhead = CONTEXT_BYTES + (NCCL_BYTES if settings.world_size > 1 else 0) + int(fragmentation * peak)
    return MemoryEstimate(
        settings=settings, gpu=moments[highest], host=host_bytes(shape, settings, static),
        disk=disk_bytes(shape, settings), loading_peak_bytes=loading_bytes(shape, settings, on_gpu(settings, static)),
        peak_bytes=peak, overhead_bytes=overhead, highest_moment=highest, moments=sums,
        activations_other_bytes=max(moment.total_bytes for moment in activations_of_step(shape, other).values()),
        trainable_parameters=trainable_parameters(shape, settings), total_parameters=shape.total_numel,
    )  # fmt: skip


def _sums(moments: dict[str, dict[str, int]]) -> dict[str, int]:
    return {name: sum(kinds.values()) for name, kinds in moments.items()}
