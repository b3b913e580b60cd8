"""What a run needs beside its GPUs: memory of a node, and disk. Arithmetic only.

Offloaded shards are pinned. torch rounds every pinned allocation up to a power of two: frozen shards share slabs of
1 GiB (host_memory.py), of which only the last is rounded; trained ones, gradients and what FSDP1 offloads are pinned
tensor by tensor. Under FSDP1 the first rank of all holds the whole model while it loads, before the engine shards it.
"""

from __future__ import annotations

import math

from hf_fsdp_qlora.memory_loading import LOOKAHEAD_BYTES
from hf_fsdp_qlora.memory_settings import (
    DTYPE_BYTES,
    GIB,
    MemorySettings,
    row_format,
    trainable_parameters,
    whole_numel,
)
from hf_fsdp_qlora.model_shape import ModelShape

PROCESS_HOST_BYTES = int(2.5 * GIB)  # Python, torch, CUDA and the libraries of one rank
SLAB_BYTES = GIB
"""As in host_memory.py, which needs torch (tested to be equal)."""


def offloaded_kinds(settings: MemorySettings) -> tuple[str, ...]:
    """Which kinds of `MemoryEstimate.gpu` are in host memory."""
    if settings.offload == "all":
        return "weights", "statistics", "other_weights", "adapters", "gradients", "optimizer"
    return ("weights", "statistics") if settings.offload == "base" else ()


def host_bytes(shape: ModelShape, settings: MemorySettings, static: dict[str, int]) -> dict[str, int]:
    """Per node.

    Args:
        static: one rank's part of everything, wherever it lives.

    Returns:
        processes; activations (with activation_offloading) and embedding (with embedding_on_host) of all ranks;
        loading (staging, and under FSDP1 the model);
        offloaded; pinned (the same, rounded; rotary: the next visit's masters); masters (rotary: the durable weights
        of all parameters, and from before the visit of those that are active).
    """
    kinds = offloaded_kinds(settings)
    frozen = sum(static[name] for name in kinds if name in ("weights", "statistics", "other_weights"))
    trained = sum(static[name] for name in kinds if name in ("adapters", "gradients"))
    pinned = 0
    if settings.offload != "none":
        frozen_pinned = in_slabs(frozen) if settings.engine == "fsdp2" else _tensor_by_tensor(shape, settings, static)
        pinned = frozen_pinned + 2 * trained  # small tensors of any size: up to twice
    loading = settings.gpus * LOOKAHEAD_BYTES
    if settings.engine == "fsdp1":
        whole = sum(static[name] for name in ("weights", "statistics", "other_weights", "adapters"))
        loading += whole * settings.shards
    masters = 0
    if settings.method == "rotary":
        active = trainable_parameters(shape, settings) * DTYPE_BYTES[settings.master_dtype]
        masters = shape.total_numel * DTYPE_BYTES[settings.master_dtype] + active
        pinned = _power_of_two(active // settings.world_size) if settings.active_fraction != 1 else 0
    return {
        "processes": settings.gpus * PROCESS_HOST_BYTES,
        "activations": settings.gpus * _offloaded_activations(shape, settings),
        "embedding": settings.gpus * whole_numel(shape, settings)[1] * DTYPE_BYTES[settings.dtype],
        "loading": loading,
        "offloaded": settings.gpus * sum(static[name] for name in kinds),
        "pinned": settings.gpus * pinned,
        "masters": masters // settings.nodes,
    }


def disk_bytes(shape: ModelShape, settings: MemorySettings) -> dict[str, int]:
    """The checkpoint of the base, and one training checkpoint with Adam's state; in rotary training, of a run that has
    been everywhere, with the states of active blocks alone."""
    base = shape.total_numel * 2
    rows = row_format(settings)
    if settings.prequantized and rows is not None:
        linears = [layer.numel for layer in shape.linears]
        quantized = shape.num_layers * sum(linears)
        base = (shape.total_numel - quantized) * 2 + shape.num_layers * sum(map(rows.num_bytes, linears))
    checkpoint = trainable_parameters(shape, settings) * 12
    if settings.method == "rotary":  # what is active also as it was before the visit
        master = DTYPE_BYTES[settings.master_dtype]
        checkpoint = shape.total_numel * master + trainable_parameters(shape, settings) * (8 + master)
    return {"base_checkpoint": base, "training_checkpoint": checkpoint}


def in_slabs(num_bytes: int) -> int:
    """Pinned bytes for tensors that share slabs."""
    return num_bytes // SLAB_BYTES * SLAB_BYTES + _power_of_two(num_bytes % SLAB_BYTES)


def _tensor_by_tensor(shape: ModelShape, settings: MemorySettings, static: dict[str, int]) -> int:
    """FSDP1: one flat parameter per decoder layer, and with offload "all" one for everything outside."""
    layer = -(-(static["weights"] + static["statistics"]) // shape.num_layers)
    outside = static["other_weights"] if settings.offload == "all" else 0
    return shape.num_layers * _power_of_two(layer) + _power_of_two(outside)


def _offloaded_activations(shape: ModelShape, settings: MemorySettings) -> int:
    """The inputs of all decoder layers, pinned one by one."""
    tokens = settings.batch_size * settings.seq_len
    one = tokens * shape.hidden_size * DTYPE_BYTES[settings.dtype]
    return shape.num_layers * _power_of_two(one) if settings.activation_offloading else 0


def _power_of_two(size: int) -> int:
    return 1 << math.ceil(math.log2(size)) if size else 0
