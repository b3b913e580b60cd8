"""How much memory a run needs, before it is started: per GPU, per host and on disk. Arithmetic only.

The peak of a GPU is the sum of what is always there (its part of the weights and statistics, of what is trained, and
of the optimizer state) and of the highest moment of a step: activations (activations.py lists them term by term), what
the engine gathers just then (memory_gathered.py), and the gradients that are there by then: all of them in every
moment with accumulation, else only in the backward of the first layer. The loading peak is in memory_loading.py, host
and disk in memory_host.py.

`peak_bytes` predicts `torch.cuda.max_memory_allocated()`. What the driver, NCCL and the allocator's fragmentation take
beside it is `overhead_bytes`; a run fits if the sum of both does.

Which parts each engine holds, W being the number of ranks that share one copy of the model:

- none: everything.
- DDP: everything, and DDP's buckets, which are as large as the gradients.
- FSDP1, FSDP2: 1/W of everything, quantised rows cut per tensor. With offload "base" the rows live in host memory;
  with "all" every parameter, gradient and optimizer state does.

What is trained: adapters (with the frozen originals of `modules_to_save` beside them), the whole model, the layers
that `expand` added (masters, and their frozen 16-bit originals), or in rotary training the active share of the
parameters: its weights and gradients in `dtype` on every rank, and 1/W of float32 masters (of bfloat16 the weights
themselves) and of the moments; parked linear layers are rows of `rotary_frozen`, everything else stays in `dtype`.

Left out: model parallelism, evaluation with generation, torch.compile's caches.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_fsdp_qlora.activations import FIRST_LAYER_MOMENT, LAYER_MOMENT, NORM_MOMENT, StepSettings, activations
from hf_fsdp_qlora.memory_gathered import gathered_bytes
from hf_fsdp_qlora.memory_host import disk_bytes, host_bytes, offloaded_kinds
from hf_fsdp_qlora.memory_loading import loading_bytes
from hf_fsdp_qlora.memory_settings import (
    DTYPE_BYTES,
    GIB,
    OPTIMIZER_STATE_BYTES,
    MemorySettings,
    row_format,
    trainable_parameters,
    whole_numel,
)
from hf_fsdp_qlora.model_shape import ModelShape, model_shape

CONTEXT_BYTES = int(0.55 * GIB)  # CUDA context with the kernels that a run loads
NCCL_BYTES = int(0.35 * GIB)  # NCCL's own buffers, with more than one GPU
FRAGMENTATION = 0.03  # of the peak
CUBLAS_BYTES = 2 * 32 * 2**20
"""cuBLAS workspaces of the main thread and of autograd's, on Hopper; 8 MiB each before it."""


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
        moments: the sum of `gpu` at every moment of the step.
        activations_other_bytes: activations with checkpointing switched the other way.
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
        padded: batches have padding, so attention gets a mask.
        active_fraction, rotary_frozen, master_dtype: as in RotaryConfig: the share of the parameters that is active
            (one decoder layer by default), the format of parked linear layers, and the dtype of masters.

    Raises:
        ConfigError: a setting is unknown, or the planner does not know the model.
    """
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
    settings = replace(settings or MemorySettings(), **changes)
    shape = model if isinstance(model, ModelShape) else model_shape(model)
    static = _static_bytes(shape, settings)
    on_gpu = {name: 0 if name in offloaded_kinds(settings) else size for name, size in static.items()}
    gradients = on_gpu.pop("gradients")
    step = _step(shape, settings)
    gathered = gathered_bytes(shape, settings)
    moments = {}
    for name, active in activations(shape, step).items():
        all_there = settings.gradient_accumulation_steps > 1 or name == FIRST_LAYER_MOMENT
        moments[name] = {
            **on_gpu,
            "gradients": gradients if all_there else _head_gradient(shape, settings, gradients, name),
            "gathered": gathered[name],
            "activations": active.kept_bytes + active.layer_bytes,
            "dequantized_and_passing": active.passing_bytes,
            "logits": active.logits_bytes,
            "workspace": CUBLAS_BYTES,
        }
    sums = {name: sum(kinds.values()) for name, kinds in moments.items()}
    highest, peak = max(sums.items(), key=lambda item: item[1])
    other = activations(shape, replace(step, checkpointing=not step.checkpointing, offloaded=False)).values()
    overhead = CONTEXT_BYTES + (NCCL_BYTES if settings.world_size > 1 else 0) + int(FRAGMENTATION * peak)
    return MemoryEstimate(
        settings=settings, gpu=moments[highest], host=host_bytes(shape, settings, static),
        disk=disk_bytes(shape, settings), loading_peak_bytes=loading_bytes(shape, settings, on_gpu),
        peak_bytes=peak, overhead_bytes=overhead, highest_moment=highest, moments=sums,
        activations_other_bytes=max(moment.total_bytes for moment in other),
        trainable_parameters=trainable_parameters(shape, settings), total_parameters=shape.total_numel,
    )  # fmt: skip


def _static_bytes(shape: ModelShape, settings: MemorySettings) -> dict[str, int]:
    """This rank's part of what is always there, wherever it lives, and of the gradients."""
    shards, dtype = settings.shards, DTYPE_BYTES[settings.dtype]
    trainable = trainable_parameters(shape, settings)
    rows = row_format(settings)
    layers = float(shape.num_layers - settings.new_layers)
    if settings.method == "rotary" and not settings.engine.startswith("fsdp"):  # active rows are released
        layers *= 1 - trainable / shape.total_numel
    codes = statistics = linear = 0
    for layer in shape.linears:
        if rows is None:
            linear += int(layers * layer.numel) * dtype // shards
        else:
            own_rows = int(layers * -(-rows.num_rows(layer.numel) // shards))
            codes, statistics = codes + own_rows * rows.code_bytes, statistics + own_rows * rows.stats_bytes
    linears = sum(layer.numel for layer in shape.linears)
    others = shape.total_numel - (shape.num_layers - settings.new_layers) * linears
    if settings.method == "rotary":
        return {
            "weights": codes + linear,
            "statistics": statistics,
            "other_weights": others * dtype,
            "replicated": 0,
        } | _rotary_bytes(trainable, settings)
    own = -(-trainable // shards)
    tail, embedding = whole_numel(shape, settings)
    full = settings.method == "full"
    trained_bytes = dtype if full else DTYPE_BYTES[settings.adapter_dtype]
    return {
        "weights": 0 if full else codes + linear,
        "statistics": statistics,
        "other_weights": 0 if full else (others - tail - embedding) * dtype // shards,
        "replicated": tail * dtype,
        "adapters": own * trained_bytes,
        "gradients": own * trained_bytes,
        "buckets": own * trained_bytes if settings.engine == "ddp" and settings.world_size > 1 else 0,
        "optimizer": own * _state_bytes(settings, trained_bytes),
    }


def _rotary_bytes(active: int, settings: MemorySettings) -> dict[str, int]:
    """Active weights and gradients are whole on every rank; masters and moments are split over all ranks."""
    dtype, master = DTYPE_BYTES[settings.dtype], DTYPE_BYTES[settings.master_dtype]
    own = -(-active // settings.world_size)
    slices = 0 if master == dtype else own * master  # of the weights' dtype, a master is the weight itself
    return {
        "adapters": active * dtype + slices,
        "gradients": active * dtype,
        "buckets": 0,
        "optimizer": own * OPTIMIZER_STATE_BYTES[settings.optimizer],  # moments are float32 or 8 bit, never 16
    }


def _head_gradient(shape: ModelShape, settings: MemorySettings, gradients: int, moment: str) -> int:
    """What a trained head's gradient takes once its backward is over and before the layers have theirs."""
    if not settings.trains_head or moment not in (NORM_MOMENT, LAYER_MOMENT):
        return 0
    numel = shape.head_numel or shape.embedding_numel
    return gradients * numel // trainable_parameters(shape, settings)


def _state_bytes(settings: MemorySettings, trained_bytes: int) -> int:
    return OPTIMIZER_STATE_BYTES[settings.optimizer] * trained_bytes // 4


def _step(shape: ModelShape, settings: MemorySettings) -> StepSettings:
    rows = row_format(settings)
    counts = shape.targeted(settings.target_modules) if settings.has_adapters else {}
    return StepSettings(
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        compute_bytes=DTYPE_BYTES[settings.dtype],
        lora=frozenset(counts),
        lora_r=settings.lora_r,
        dropout=settings.lora_dropout > 0,
        fused_lora=settings.lora_dropout == 0 and settings.engine != "fsdp1" and rows is not None,
        checkpointing=settings.gradient_checkpointing,
        offloaded=settings.activation_offloading,
        padded=settings.padded,
        quantized=rows is not None and rows.code_bytes < rows.row_size * DTYPE_BYTES[settings.dtype],  # else a view
        block_size=settings.row_block,
        trains_head=settings.trains_head,
        head_is_cast=settings.trains_head and settings.has_adapters and not settings.engine.startswith("fsdp"),
        trains_base=not settings.has_adapters,
    )
