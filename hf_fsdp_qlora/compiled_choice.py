"""The wizard's choice of compiled decoder layers: whether, with which batch, and how much they recompute.

Compiling pays for adapters on a GPU, whole on every card (benchmarks/RESULTS.md, "Training speed"), and memory that is
left pays as a larger `activation_budget`: fewer products are computed again. A larger batch does not, once the GPU is
busy: at 8,192 tokens of an 8B shape its own time was 90 % of a step. So of the batches that are that much work the one
with the largest budget is taken, of equal ones the larger; and if none is, the largest that fits.

Left out, because nothing is known to pay or compiling is refused: CPUs, FSDP, rotary training, dropout in LoRA, and
architectures that the planner does not know compiled.
"""

from __future__ import annotations

from dataclasses import replace

from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.memory_compiled import knows_compiled
from hf_fsdp_qlora.memory_settings import GIB, MemorySettings
from hf_fsdp_qlora.model_shape import ModelShape
from hf_fsdp_qlora.planning import largest_activation_budget

BUSY_WORK = 8192 * 218_103_808
"""Tokens of a micro-batch times weights in the linear layers of a decoder layer, at which a GPU is busy."""


def choose_compiled(
    shape: ModelShape, settings: MemorySettings, card_bytes: float, *, largest_batch: int
) -> tuple[MemorySettings | None, str]:
    """Compiled layers for a run on GPUs, if that is possible.

    Args:
        settings: the run with eager layers.
        card_bytes: memory of one card.
        largest_batch: sequences per GPU that are allowed.

    Returns:
        The settings with batch size, padding and budget chosen, or None; and the reason, "" where nothing is to be
        said: FSDP and rotary training.
    """
    if not settings.has_adapters or settings.engine not in ("none", "ddp"):
        return None, ""
    if not knows_compiled(shape):
        return None, f"Layers are not compiled: the planner does not know those of {shape.model_type} compiled."
    possible: list[tuple[float, int]] = []
    batch_size = 1
    while batch_size <= largest_batch:
        tried = replace(settings, batch_size=batch_size, padded=batch_size > 1)
        budget = largest_activation_budget(shape, tried, card_bytes)
        possible += [] if budget is None else [(budget, batch_size)]
        batch_size *= 2
    if not possible:
        least = estimate_memory(shape, replace(settings, compile_layers=True, activation_budget=0.0))
        return None, f"Layers are not compiled: that needs {least.needed_bytes / GIB:.1f} GiB a card at batch 1."
    weights = sum(linear.numel for linear in shape.linears)
    busy = [(budget, size) for budget, size in possible if size * settings.seq_len * weights >= BUSY_WORK]
    budget, batch_size = max(busy) if busy else possible[-1]
    chosen = replace(
        settings, batch_size=batch_size, padded=batch_size > 1, compile_layers=True, activation_budget=budget
    )  # fmt: skip
    return chosen, _reason(budget, bool(busy), batch_size, possible[-1][1])


def _reason(budget: float, busy: bool, batch_size: int, largest: int) -> str:
    why = "the largest that fits" if batch_size == largest else "enough to keep a GPU busy"
    if busy and batch_size < largest:
        why += f"; {largest} would fit, but recompute more"
    return (
        "Layers are compiled: an 8B model on an H200 then did 4,810 tokens a second where 3,065 without (batch 1), "
        f"10,278 where 8,966 (batch 4); the first steps take longer. Batch {batch_size}: {why}. activation_budget "
        f"{budget:g}: of what layers can keep for backward (1: all that is expensive to compute, 0: nothing) the most "
        "that fits; the rest is computed again, in place of gradient_checkpointing."
    )
