"""What a planner is asked: how large may the batch or the sequence be, and what is the cheapest way to make it fit.

"Cheapest" is an order from what costs nothing to what costs most, not a calculation of time: see `_changes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hf_fsdp_qlora.memory import MemoryEstimate, estimate_memory
from hf_fsdp_qlora.memory_settings import MemorySettings
from hf_fsdp_qlora.model_shape import ModelShape

MAX_BATCH_SIZE = 1024
SEQUENCE_STEP = 256
ACTIVATION_BUDGETS = (1.0, 0.7, 0.6, 0.5, 0.45, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Those that are proposed, what recomputes least first. From 0.7 on a layer like Llama's computes no product again."""
Change = tuple[str, Callable[[MemorySettings], MemorySettings | None]]


def largest_batch_size(shape: ModelShape, settings: MemorySettings, gpu_memory_bytes: float) -> int:
    """The largest batch per GPU that fits, 0 if none does."""

    def fits(batch_size: int) -> bool:
        return estimate_memory(shape, replace(settings, batch_size=batch_size)).fits(gpu_memory_bytes)

    return _largest(fits, MAX_BATCH_SIZE)


def largest_seq_len(shape: ModelShape, settings: MemorySettings, gpu_memory_bytes: float) -> int:
    """The longest sequence that fits at the settings' batch size, in steps of 256 tokens, at most the model's own."""

    def fits(steps: int) -> bool:
        seq_len = steps * SEQUENCE_STEP
        return estimate_memory(shape, replace(settings, seq_len=seq_len)).fits(gpu_memory_bytes)

    return _largest(fits, max(1, (shape.max_positions or 2**20) // SEQUENCE_STEP)) * SEQUENCE_STEP


def largest_activation_budget(shape: ModelShape, settings: MemorySettings, gpu_memory_bytes: float) -> float | None:
    """The largest of `ACTIVATION_BUDGETS` with which compiled layers fit, None if none does.

    Raises:
        ConfigError: the planner does not know the model's layers compiled, or the settings do not allow it.
    """

    def fits(budget: float) -> bool:
        compiled = replace(settings, compile_layers=True, activation_budget=budget)
        return estimate_memory(shape, compiled).fits(gpu_memory_bytes)

    return next((budget for budget in ACTIVATION_BUDGETS if fits(budget)), None)


def cheapest_change(
    shape: ModelShape, settings: MemorySettings, gpu_memory_bytes: float, host_memory_bytes: float | None = None
) -> tuple[str, MemoryEstimate] | None:
    """What to change so that the run fits: the cheapest single change, else the shortest series of changes, else
    another method.

    Args:
        host_memory_bytes: memory of a node; changes that need more are not proposed. None does not limit them.

    Returns:
        The change in words and its estimate, or None if nothing known makes it fit.
    """

    def tried(changed: MemorySettings) -> MemoryEstimate | None:
        estimate = estimate_memory(shape, changed)
        return estimate if estimate.fits(gpu_memory_bytes, host_memory_bytes) else None

    for words, change in (_ON_THE_GPU, *_changes(shape)):
        changed = change(settings)
        estimate = tried(changed) if changed is not None else None
        if estimate is not None:
            return words, estimate
    series: list[Change] = []
    current = settings
    for each in _changes(shape):
        changed = each[1](current)
        if changed is None or (each in _OUTSIDE_CHANGES and _hurts(shape, current, changed)):
            continue
        current = changed
        series.append(each)
        if tried(current) is not None:
            return _shortest(series, settings, tried)
    words, change = _ANOTHER_METHOD
    changed = change(settings)
    estimate = tried(changed) if changed is not None else None
    return (words, estimate) if estimate is not None else None


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _shortest(
    series: list[Change], settings: MemorySettings, tried: Callable[[MemorySettings], MemoryEstimate | None]
) -> tuple[str, MemoryEstimate]:
    """A series that fits, without the changes that it fits without; the dearest go first."""

    def applied(changes: list[Change]) -> MemorySettings:
        current = settings
        for _, change in changes:
            current = change(current) or current
        return current

    for each in reversed(series):
        rest = [other for other in series if other is not each]
        if tried(applied(rest)) is not None:
            series = rest
    estimate = tried(applied(series))
    assert estimate is not None
    return "; ".join(words for words, _ in series), estimate


def _hurts(shape: ModelShape, before: MemorySettings, after: MemorySettings) -> bool:
    """Whether a change adds to the card, as a replicated head may: it then stays out of a series. All others stay in
    one, even if they take nothing by themselves: the peak may be at another moment until a later change lowers it."""
    return estimate_memory(shape, after).needed_bytes > estimate_memory(shape, before).needed_bytes


def _changes(shape: ModelShape) -> tuple[Change, ...]:
    """All changes for this model, cheapest first."""
    if not shape.head_numel:
        return (*_CHANGES, *_SLOW_CHANGES)
    return (*_CHANGES, *_OUTSIDE_CHANGES, *_SLOW_CHANGES)


def _outside(**options: bool) -> Callable[[MemorySettings], MemorySettings | None]:
    def change(settings: MemorySettings) -> MemorySettings | None:
        trained = set(settings.modules_to_save) & {"embed_tokens", "embed_in", "lm_head", "embed_out"}
        changed = any(getattr(settings, name) != value for name, value in options.items())
        if settings.engine != "fsdp2" or not settings.has_adapters or trained or not changed:
            return None
        return replace(settings, **options)  # type: ignore[arg-type]

    return change


def _checkpointing(settings: MemorySettings) -> MemorySettings | None:
    if settings.gradient_checkpointing or settings.activation_budget is not None:
        return None
    return replace(settings, gradient_checkpointing=True)


def _budget(budget: float) -> Callable[[MemorySettings], MemorySettings | None]:
    def change(settings: MemorySettings) -> MemorySettings | None:
        if settings.activation_budget is None or settings.activation_budget <= budget:
            return None
        return replace(settings, activation_budget=budget)

    return change


def _not_compiled(settings: MemorySettings) -> MemorySettings | None:
    if settings.activation_budget is None:
        return None
    return replace(settings, compile_layers=False, activation_budget=None, gradient_checkpointing=True)


def _shard(settings: MemorySettings) -> MemorySettings | None:
    if settings.engine != "ddp":
        return None
    return replace(_not_compiled(settings) or settings, engine="fsdp2", compile_layers=False)


def _batch_of_one(settings: MemorySettings) -> MemorySettings | None:
    if settings.batch_size == 1:
        return None
    steps = settings.gradient_accumulation_steps * settings.batch_size
    return replace(settings, batch_size=1, gradient_accumulation_steps=steps)


def _double_quant(settings: MemorySettings) -> MemorySettings | None:
    if settings.method != "qlora" or settings.double_quant:
        return None
    return replace(settings, double_quant=True)


def _quantize(settings: MemorySettings) -> MemorySettings | None:
    return replace(settings, method="qlora") if settings.method == "lora" else None


def _four_bits(settings: MemorySettings) -> MemorySettings | None:
    if settings.method != "qlora" or settings.quant_format != "int8":
        return None
    return replace(settings, quant_format="nf4", block_size=None)


def _half_masters(settings: MemorySettings) -> MemorySettings | None:
    if settings.method != "rotary" or settings.master_dtype == "bfloat16":
        return None
    return replace(settings, master_dtype="bfloat16")


def _eight_bit_moments(settings: MemorySettings) -> MemorySettings | None:
    # Not on the shards of FSDP; rotary training keeps its own, whole ones.
    if settings.engine.startswith("fsdp") and settings.method != "rotary":
        return None
    return replace(settings, optimizer="adamw_8bit") if settings.optimizer.startswith("adamw_torch") else None


def _offload(where: str) -> Callable[[MemorySettings], MemorySettings | None]:
    def change(settings: MemorySettings) -> MemorySettings | None:
        if settings.method in ("full", "rotary") or settings.offload in (where, "all"):
            return None
        if settings.engine == "ddp":
            return None
        engine = "fsdp2" if settings.engine == "none" else settings.engine
        return replace(_not_compiled(settings) or settings, offload=where, engine=engine, compile_layers=False)

    return change


def _shorter(settings: MemorySettings) -> MemorySettings | None:
    return replace(settings, seq_len=settings.seq_len // 2) if settings.seq_len >= 2 * SEQUENCE_STEP else None


def _to_qlora(settings: MemorySettings) -> MemorySettings | None:
    return replace(settings, method="qlora") if settings.method in ("full", "rotary") else None


def _no_offload(settings: MemorySettings) -> MemorySettings | None:
    return replace(settings, offload="none") if settings.offload != "none" else None


_ON_THE_GPU: Change = ("keep everything on the GPUs (offload: none), which is faster too", _no_offload)
"""By itself only: a series that offloads would take it back."""
_CHANGES: tuple[Change, ...] = (
    ("double quantisation (use_bnb_nested_quant: true)", _double_quant),
    *(
        (f"recompute more in the compiled layers (activation_budget: {budget})", _budget(budget))
        for budget in ACTIVATION_BUDGETS[1:]
    ),
    ("a batch of 1 with more accumulation (the same global batch)", _batch_of_one),
    ("gradient checkpointing (gradient_checkpointing: true), about a third more time", _checkpointing),
    ("gradient checkpointing in place of compiled layers (no compile_layers, no activation_budget)", _not_compiled),
    ("shard with FSDP2 instead of DDP (accelerate_configs/fsdp2.yaml)", _shard),
    ("8-bit moments (optim: adamw_8bit)", _eight_bit_moments),
    ('bfloat16 masters, rounded stochastically (RotaryConfig(master_dtype="bfloat16"))', _half_masters),
    ("4 bits in place of 8 for the base (load_in_4bit: true)", _four_bits),
    ("quantise the base (load_in_4bit: true)", _quantize),
)
"""From what changes nothing in the result to what changes it most."""
_OUTSIDE_CHANGES: tuple[Change, ...] = (
    ("the embedding in host memory (embedding_on_host: true)", _outside(embedding_on_host=True)),
    ("the head whole on every GPU (replicate_head: true)", _outside(replicate_head=True)),
    (
        "the head whole on every GPU and the embedding in host memory (replicate_head: true, embedding_on_host: true)",
        _outside(replicate_head=True, embedding_on_host=True),
    ),
)
"""For models whose head is not tied to the embedding."""
_SLOW_CHANGES: tuple[Change, ...] = (
    ('keep the quantised rows in host memory (load_model(offload="base"))', _offload("base")),
    ("keep all parameters in host memory (accelerate_configs/fsdp2_offload.yaml)", _offload("all")),
    ("half the sequence length", _shorter),
)
"""Copies of layers in every step, and what changes the result most."""
_ANOTHER_METHOD: Change = ("train adapters on a 4-bit base (QLoRA) instead of all weights", _to_qlora)
"""The last resort, after every series of the others."""
