"""What a rank's GPU holds at each moment of a step, by kind: its parts of the model and what comes on top. Arithmetic.

Which parts each engine holds, W being the number of ranks that share one copy of the model:

- none: everything.
- DDP: everything, and DDP's buckets, which are as large as the gradients.
- FSDP1, FSDP2: 1/W of everything, quantised rows cut per tensor. With offload "base" the rows live in host memory;
  with "all" every parameter, gradient and optimizer state does.

What is trained: adapters (with the frozen originals of `modules_to_save` beside them), the whole model, the layers
that `expand` added (masters, and their frozen 16-bit originals), or in rotary training the active blocks: their
weights and gradients in `dtype` on every rank, and 1/W of float32 masters (of bfloat16 the weights themselves) and of
the moments; parked linear layers are rows of `rotary_frozen`, everything else stays in `dtype`.

Gradients are there in every moment with accumulation, else only those that are made by then: a trained head's from the
head's backward on, and all in the first layer's. Rotary training counts them one by one: in the backward of an active
last layer that of its MLP out, in the first layer's not yet the others of that layer, at the end all of them.
"""

from __future__ import annotations

from dataclasses import replace

from hf_fsdp_qlora.activations import (
    END_MOMENT,
    FIRST_LAYER_MOMENT,
    LAYER_MOMENT,
    NORM_MOMENT,
    Activations,
    StepSettings,
    activations,
)
from hf_fsdp_qlora.memory_compiled import compiled_activations
from hf_fsdp_qlora.memory_gathered import gathered_bytes
from hf_fsdp_qlora.memory_host import offloaded_kinds
from hf_fsdp_qlora.memory_settings import (
    DTYPE_BYTES,
    OPTIMIZER_STATE_BYTES,
    MemorySettings,
    row_format,
    trainable_parameters,
    whole_numel,
)
from hf_fsdp_qlora.memory_visits import Visit
from hf_fsdp_qlora.model_shape import MLP_OUT, ModelShape

CUBLAS_BYTES = 2 * 32 * 2**20
"""cuBLAS workspaces of the main thread and of autograd's, on Hopper; 8 MiB each before it."""


def moments_of_step(
    shape: ModelShape, settings: MemorySettings, visit: Visit | None = None
) -> dict[str, dict[str, int]]:
    """Bytes by moment, then by kind (those of `MemoryEstimate.gpu`).

    Args:
        visit: of rotary training, which blocks are active; None otherwise.
    """
    held = on_gpu(settings, static_bytes(shape, settings, visit))
    all_gradients = held.pop("gradients")
    gathered = gathered_bytes(shape, settings)
    moments = {}
    for name, active in activations_of_step(shape, settings, visit).items():
        moments[name] = {
            **held,
            "gradients": _gradients(shape, settings, visit, name, all_gradients),
            "gathered": gathered.get(name, 0),
            "activations": active.kept_bytes + active.layer_bytes,
            "dequantized_and_passing": active.passing_bytes,
            "logits": active.logits_bytes,
            "workspace": CUBLAS_BYTES,
        }
    return moments


def on_gpu(settings: MemorySettings, static: dict[str, int]) -> dict[str, int]:
    """The same without what is offloaded."""
    return {name: 0 if name in offloaded_kinds(settings) else size for name, size in static.items()}


def static_bytes(shape: ModelShape, settings: MemorySettings, visit: Visit | None = None) -> dict[str, int]:
    """This rank's part of what is always there, wherever it lives, and of the gradients.

    Args:
        visit: of rotary training; None is everything parked.
    """
    shards, dtype = settings.shards, DTYPE_BYTES[settings.dtype]
    layers = shape.num_layers - settings.new_layers
    if visit is not None and not settings.engine.startswith("fsdp"):  # active rows are released
        layers -= visit.layers
    rows = row_format(settings)
    codes = statistics = linear = 0
    for layer in shape.linears:
        if rows is None:
            linear += layers * layer.numel * dtype // shards
        else:
            own_rows = layers * -(-rows.num_rows(layer.numel) // shards)
            codes, statistics = codes + own_rows * rows.code_bytes, statistics + own_rows * rows.stats_bytes
    linears = sum(layer.numel for layer in shape.linears)
    others = shape.total_numel - (shape.num_layers - settings.new_layers) * linears
    if settings.method == "rotary":
        return {
            "weights": codes + linear,
            "statistics": statistics,
            "other_weights": (others - _replaced_numel(shape, visit)) * dtype,
            "replicated": 0,
        } | _rotary_bytes(visit.numel if visit is not None else 0, settings)
    own = -(-trainable_parameters(shape, settings) // shards)
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
        "optimizer": own * OPTIMIZER_STATE_BYTES[settings.optimizer] * trained_bytes // 4,
    }


def step_settings(shape: ModelShape, settings: MemorySettings, visit: Visit | None = None) -> StepSettings:
    """What the activations depend on; of rotary training where the last decoder layer is at hand."""
    rows = row_format(settings)
    counts = shape.targeted(settings.target_modules) if settings.has_adapters else {}
    step = StepSettings(
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
        joins=settings.compile_layers and settings.method == "qlora" and settings.quant_format in ("nf4", "fp4"),
    )
    if visit is None:
        return step
    return replace(
        step, trains_head=visit.head, trains_embedding=visit.embedding, backward_layers=visit.backward_layers,
        trained_layers=visit.layers, trains_base=visit.trains_last, quantized=step.quantized and not visit.trains_last,
    )  # fmt: skip


def activations_of_step(
    shape: ModelShape, settings: MemorySettings, visit: Visit | None = None
) -> dict[str, Activations]:
    """Activations by moment, of eager or of compiled decoder layers."""
    if settings.compile_layers:
        return compiled_activations(shape, step_settings(shape, settings), settings.activation_budget)
    moments = activations(shape, step_settings(shape, settings, visit))
    if visit is not None and visit.backward_layers:
        first = replace(visit, trains_last=visit.trains_first)
        moments[FIRST_LAYER_MOMENT] = activations(shape, step_settings(shape, settings, first))[FIRST_LAYER_MOMENT]
    return moments


def _replaced_numel(shape: ModelShape, visit: Visit | None) -> int:
    """Unquantised parameters that are active, so that nothing of them is parked; those of `_rotary_bytes`."""
    return 0 if visit is None else visit.outside_numel + visit.layers * shape.layer_other_numel


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


def _gradients(
    shape: ModelShape, settings: MemorySettings, visit: Visit | None, moment: str, all_gradients: int
) -> int:
    """Those that are there at a moment, see the module."""
    dtype = DTYPE_BYTES[settings.dtype]
    last_made = dtype * (shape.embedding_numel if visit is not None and visit.embedding else 0)
    if settings.gradient_accumulation_steps > 1:
        return all_gradients + (last_made if moment == END_MOMENT else 0)  # it is added to the one before
    mlp_out = sum(linear.numel for linear in shape.linears if linear.leaf in MLP_OUT)
    tied = not shape.head_numel  # the head's share is there already, and the embedding's is added to it
    if moment == FIRST_LAYER_MOMENT:
        later = shape.layer_numel - mlp_out if visit is not None and visit.trains_first else 0
        return all_gradients - (0 if tied else last_made) - dtype * later
    if moment == END_MOMENT:
        return all_gradients + (last_made if tied else 0)
    if moment not in (NORM_MOMENT, LAYER_MOMENT):
        return 0
    gradients = 0
    if visit.head if visit is not None else settings.trains_head:
        trained = visit.numel if visit is not None else trainable_parameters(shape, settings)
        gradients = all_gradients * (shape.head_numel or shape.embedding_numel) // trained
    if visit is not None and visit.trains_last and moment == LAYER_MOMENT:
        gradients += dtype * mlp_out
    return gradients
