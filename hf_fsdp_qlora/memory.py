"""How much memory a run needs, before it is started: per GPU, per host and on disk. Arithmetic only.

The peak of a GPU is the sum of what is always there (its part of the weights and statistics, of the adapters, and of
their optimizer state) and of the highest moment of a step (gradients, gathered layers, activations; activations.py
lists them term by term). `peak_bytes` predicts `torch.cuda.max_memory_allocated()`. What the driver, NCCL and the
allocator's fragmentation take beside it is `overhead_bytes`; a run fits if the sum of both does.

Which parts each engine holds, W being the number of ranks:

- none: everything.
- DDP: everything, and trainable gradients twice, because DDP copies them into its buckets.
- FSDP2: 1/W of everything, quantised rows cut per tensor. Gathered on top: the rows of two layers (one runs while the
  next is fetched), the adapters of two layers in the compute dtype, and the final norm and the head throughout.
- FSDP2 with offload "base": the rows live in pinned host memory, rounded up to powers of two per tensor. With "all",
  every parameter, gradient and optimizer state does.

FSDP1 is counted like FSDP2. Reduce-scatter buffers are float32 gradients of one layer.

Left out: model parallelism, evaluation with generation, torch.compile's caches.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_fsdp_qlora.activations import Activations, StepSettings, activations
from hf_fsdp_qlora.formats import RowFormat
from hf_fsdp_qlora.memory_settings import (
    DTYPE_BYTES,
    GIB,
    INT8_BLOCK,
    OPTIMIZER_STATE_BYTES,
    MemorySettings,
    row_format,
    trainable_parameters,
)
from hf_fsdp_qlora.model_shape import ModelShape, model_shape

CONTEXT_BYTES = int(0.55 * GIB)  # CUDA context with the kernels that a run loads
NCCL_BYTES = int(0.35 * GIB)  # NCCL's own buffers, with more than one GPU
FRAGMENTATION = 0.03  # of the peak
PROCESS_HOST_BYTES = int(2.5 * GIB)  # Python, torch, CUDA and the libraries of one rank
STAGING_BYTES = 256 * 2**20  # what the loader reads ahead
CUBLAS_BYTES = 32 * 2**20  # cuBLAS workspace on Hopper; 8 MiB before it


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by kind. `gpu` adds up to `peak_bytes`; `host` is per node; `disk` is per run.

    Attributes:
        gpu: weights, statistics, other_weights, adapters, gradients, optimizer, gathered, activations,
            dequantized_and_passing, logits, workspace.
        loading_peak_bytes: highest while the model is loaded.
        peak_bytes: predicted `torch.cuda.max_memory_allocated()`.
        overhead_bytes: what the card holds beside it.
        highest_moment: where in the step the peak is.
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
    activations_other_bytes: int
    trainable_parameters: int
    total_parameters: int

    @property
    def needed_bytes(self) -> int:
        """What a card must have."""
        return self.peak_bytes + self.overhead_bytes

    def fits(self, gpu_memory_bytes: float) -> bool:
        """Whether a card of that size is enough."""
        return self.needed_bytes <= gpu_memory_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "needed_bytes": self.needed_bytes}


def estimate_memory(
    model: str | os.PathLike[str] | ModelShape | Any, settings: MemorySettings | None = None, **changes: Any
) -> MemoryEstimate:
    """Predict a run's memory from the model's config alone.

    Args:
        model: a folder or hub id, a transformers config, or a `ModelShape`.
        settings: a run; `changes` are applied on top.
        method: "qlora" (4-bit base), "lora" (16-bit base), "full" (everything is trained, in `dtype`) or "rotary"
            (everything in int8 but `active_fraction` of it, which is trained in float32).
        engine: "none", "ddp", "fsdp1" or "fsdp2".
        gpus, nodes: GPUs per node, and nodes.
        offload: "none"; "base" keeps quantised rows in host memory, "all" everything (FSDP).
        dtype, adapter_dtype: of computation and unquantised weights; of trained adapters.
        quant_format, block_size, double_quant: how "qlora" stores the base: "nf4", "fp4", "int8" or "hqq" (4 bits).
        lora_r, lora_dropout, target_modules, modules_to_save: as in PEFT's LoraConfig.
        optimizer: transformers' name for it.
        batch_size, seq_len, gradient_accumulation_steps: per GPU.
        gradient_checkpointing: recompute each decoder layer in backward.
        padded: batches have padding, so attention gets a mask.
        active_fraction: of the parameters (rotary); one decoder layer by default.

    Raises:
        ConfigError: a setting is unknown, or the planner does not know the model.
    """
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
    settings = replace(settings or MemorySettings(), **changes)
    shape = model if isinstance(model, ModelShape) else model_shape(model)
    static = _static_bytes(shape, settings)
    rows = row_format(settings)
    step = _step(shape, settings)
    active = activations(shape, step)
    other = activations(shape, replace(step, checkpointing=not step.checkpointing))
    gathered = _gathered_bytes(shape, settings, rows)
    trainable = trainable_parameters(shape, settings)
    gpu = {
        **{name: 0 if name in _offloaded(settings) else size for name, size in static.items()},
        "gathered": gathered,
        "activations": active.kept_bytes + active.layer_bytes,
        "dequantized_and_passing": active.passing_bytes,
        "logits": active.logits_bytes,
        "workspace": CUBLAS_BYTES,
    }
    peak = sum(gpu.values())
    if settings.gradient_accumulation_steps == 1:
        # Gradients appear layer by layer while activations go: they are not there together, whichever is more.
        freed = min(gpu["gradients"], _freed_by_backward(step, active))
        peak -= freed
        gpu["gradients"] -= freed
    overhead = CONTEXT_BYTES + (NCCL_BYTES if settings.world_size > 1 else 0) + int(FRAGMENTATION * peak)
    return MemoryEstimate(
        settings=settings, gpu=gpu, host=_host_bytes(shape, settings, static), disk=_disk_bytes(shape, trainable),
        loading_peak_bytes=_loading_bytes(shape, settings, gpu, rows), peak_bytes=peak, overhead_bytes=overhead,
        highest_moment=active.moment, activations_other_bytes=other.total_bytes,
        trainable_parameters=trainable, total_parameters=shape.total_numel,
    )  # fmt: skip


def _static_bytes(shape: ModelShape, settings: MemorySettings) -> dict[str, int]:
    """This rank's part of what is always there, wherever it lives."""
    rows, shards, dtype = row_format(settings), settings.shards, DTYPE_BYTES[settings.dtype]
    trainable = -(-trainable_parameters(shape, settings) // shards)
    codes = statistics = linear = 0
    for layer in shape.linears:
        if rows is None:
            linear += shape.num_layers * layer.numel * dtype // shards
        else:
            own_rows = shape.num_layers * -(-rows.num_rows(layer.numel) // shards)
            codes, statistics = codes + own_rows * rows.code_bytes, statistics + own_rows * rows.stats_bytes
    others = (shape.outside_numel + shape.num_layers * shape.layer_other_numel) * dtype // shards
    if settings.method in ("full", "rotary"):
        trained_bytes = dtype if settings.method == "full" else 4
        gradient_bytes, others = trained_bytes, 0 if settings.method == "full" else others
        linear = 0 if settings.method == "full" else linear
        state = OPTIMIZER_STATE_BYTES[settings.optimizer] * trained_bytes // 4
    else:
        trained_bytes = gradient_bytes = DTYPE_BYTES[settings.adapter_dtype]
        state = OPTIMIZER_STATE_BYTES[settings.optimizer] * trained_bytes // 4
    buckets = 2 if settings.engine == "ddp" and settings.world_size > 1 else 1
    return {
        "weights": codes + linear,
        "statistics": statistics,
        "other_weights": others,
        "adapters": trainable * trained_bytes,
        "gradients": trainable * gradient_bytes * buckets,
        "optimizer": trainable * state,
    }


def _offloaded(settings: MemorySettings) -> tuple[str, ...]:
    if settings.offload == "all":
        return "weights", "statistics", "other_weights", "adapters", "gradients", "optimizer"
    return ("weights", "statistics") if settings.offload == "base" else ()


def _layer_row_bytes(shape: ModelShape, settings: MemorySettings, rows: RowFormat | None) -> int:
    dtype = DTYPE_BYTES[settings.dtype]
    return sum(layer.numel * dtype if rows is None else rows.num_bytes(layer.numel) for layer in shape.linears)


def _gathered_bytes(shape: ModelShape, settings: MemorySettings, rows: RowFormat | None) -> int:
    if not settings.engine.startswith("fsdp"):
        return 0
    dtype = DTYPE_BYTES[settings.dtype]
    layer = _layer_row_bytes(shape, settings, rows)
    trained = 0
    if settings.method in ("qlora", "lora"):
        trained = trainable_parameters(shape, replace(settings, modules_to_save=())) // shape.num_layers
    reduce_buffers = trained * (dtype + 4) if settings.method != "full" else shape.layer_numel * (dtype + 4)
    head = (shape.head_numel or shape.embedding_numel) * dtype + shape.outside_other_numel * dtype
    # The adapters of the running layer are in the activations; those of the fetched one are here.
    return 2 * layer + trained * dtype + reduce_buffers + head


def _step(shape: ModelShape, settings: MemorySettings) -> StepSettings:
    adapters = settings.method in ("qlora", "lora")
    counts = shape.targeted(settings.target_modules) if adapters else {}
    return StepSettings(
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        compute_bytes=DTYPE_BYTES[settings.dtype],
        lora=frozenset(counts),
        lora_r=settings.lora_r,
        dropout=settings.lora_dropout > 0,
        checkpointing=settings.gradient_checkpointing,
        padded=settings.padded,
        quantized=row_format(settings) is not None,
        block_size=settings.block_size if settings.method == "qlora" else INT8_BLOCK,
        trains_head=settings.method == "full" or bool({"lm_head", "embed_out"} & set(settings.modules_to_save)),
        trains_base=not adapters,
    )


def _freed_by_backward(step: StepSettings, active: Activations) -> int:
    """Activations that are gone when the last gradient is there: all that is kept for other layers."""
    return active.kept_bytes if step.checkpointing else active.kept_bytes + active.logits_bytes


def _loading_bytes(shape: ModelShape, settings: MemorySettings, gpu: dict[str, int], rows: RowFormat | None) -> int:
    static = sum(gpu[name] for name in ("weights", "statistics", "other_weights", "adapters"))
    largest = max(layer.numel for layer in shape.linears)
    slice_bytes = largest // settings.shards * DTYPE_BYTES[settings.dtype]
    absmax = largest // settings.block_size * 4 * 2 if rows is not None else 0
    checked = 2 * _layer_row_bytes(shape, settings, rows) if settings.engine.startswith("fsdp") else 0
    return static + max(STAGING_BYTES + 2 * slice_bytes + absmax, checked)


def _host_bytes(shape: ModelShape, settings: MemorySettings, static: dict[str, int]) -> dict[str, int]:
    """Per node."""
    rows = row_format(settings)
    offloaded = sum(static[name] for name in _offloaded(settings))
    pinned = 0
    if settings.offload != "none":
        for layer in shape.linears:
            own_rows = -(-rows.num_rows(layer.numel) // settings.shards) if rows is not None else 0
            sizes = [own_rows * rows.code_bytes, own_rows * rows.stats_bytes] if rows is not None else []
            sizes = sizes or [layer.numel * DTYPE_BYTES[settings.dtype] // settings.shards]
            pinned += shape.num_layers * sum(_power_of_two(size) for size in sizes)
        if settings.offload == "all":
            pinned += sum(static[name] for name in ("other_weights", "adapters", "gradients"))
    return {
        "processes": settings.gpus * PROCESS_HOST_BYTES,
        "loading": settings.gpus * (STAGING_BYTES + max(layer.numel for layer in shape.linears) * 2),
        "offloaded": settings.gpus * offloaded,
        "pinned": settings.gpus * pinned,
    }


def _disk_bytes(shape: ModelShape, trainable: int) -> dict[str, int]:
    """The 16-bit checkpoint of the base, and one training checkpoint with Adam's state."""
    return {"base_checkpoint": shape.total_numel * 2, "training_checkpoint": trainable * 12}


def _power_of_two(size: int) -> int:
    return 1 << math.ceil(math.log2(size)) if size else 0
