"""Do 4-bit bytes survive FSDP2's all-gather? This package and the stock stack, side by side, on two ranks.

    python benchmarks/byte_integrity.py          (PYTHONPATH=. in front where the package is not installed)

Uses two GPUs, or lets two NCCL ranks share one, or without a GPU two gloo ranks on the CPU. The stock stack's damage
needs CUDA: there FSDP2 copies shards with `torch._foreach_copy_`, which rewrites NaN bit patterns of bf16 and fp16
(https://github.com/pytorch/pytorch/issues/159333). On the CPU the copy is exact and the stock stack shows nothing.

The model is a tiny random Llama made on the spot. Checked for this package, without and with CPU offload: gathered
rows and dequantised weights against bitsandbytes on whole tensors, when loaded, inside forward and recomputation, and
after an optimizer step; logits against the stock unsharded model. Beyond bytes: losses and gradients of two ranks
against one plain process, TRL's fused head with a trained head, and torch.compile without a graph break.

Ends with one table; the exit status is 1 if anything but the stock stack misses its limit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from integrity_ours import check_ours
from integrity_stock import ByteCheck, check_stock
from integrity_training import Compiled, Training, compile_layer, train_everything
from launch import FSDP2_ENV, describe_machine, run_ranks
from tiny_llama import relative_error, save_tiny_llama

RANKS = 2
LOSS_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Relative. float32: other batch shapes and orders of summation. bf16: rounding, 2**-8 per value, averaged out."""
GRADIENT_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
LOGIT_LIMIT = 1e-2


@dataclass(frozen=True)
class Line:
    """A row of the table. `good` is None where nothing is demanded (the stock stack)."""

    what: str
    measured: str
    good: bool | None


def main() -> None:
    print(describe_machine(), flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_llama(Path(folder))
        # Every part has processes of its own; beside a GPU there are cores enough to run the parts at the same time.
        with ThreadPoolExecutor(5 if torch.cuda.is_available() else 1) as parts:
            running = [
                parts.submit(run_ranks, check_stock, folder, world_size=RANKS),
                parts.submit(run_ranks, check_ours, folder, world_size=RANKS, env=FSDP2_ENV),
                parts.submit(run_ranks, train_everything, folder, world_size=RANKS, env=FSDP2_ENV),
                parts.submit(run_ranks, train_everything, folder, world_size=1, process_group=False),
                parts.submit(run_ranks, compile_layer, folder, world_size=1, process_group=False),
            ]
            stock, ours, (sharded, *_), (plain,), (compiled,) = (part.result() for part in running)
    lines = byte_lines(stock, ours) + training_lines(sharded, plain) + [compile_line(compiled)]
    width = max(len(line.what) for line in lines)
    print(f"\n{RANKS} {'NCCL' if torch.cuda.is_available() else 'gloo'} ranks, {time.perf_counter() - started:.0f} s")
    for line in lines:
        verdict = "" if line.good is None else "ok" if line.good else "WRONG"
        print(f"{line.what:<{width}}  {verdict:5}  {line.measured}")
    if not torch.cuda.is_available():
        print("On the CPU the stock stack's copies are exact; its damage shows on CUDA only.")
    if any(line.good is False for line in lines):
        raise SystemExit(1)


def byte_lines(stock: list[ByteCheck], ours: list[dict[str, list[ByteCheck]]]) -> list[Line]:
    """Every look at gathered bytes, that of the rank where it was worst."""
    lines = [byte_line("stock FSDP2, bf16 storage", _worst(stock), demanded=False)]
    for offload in ours[0]:
        for checks in zip(*(rank[offload] for rank in ours), strict=True):
            lines.append(byte_line(f"ours, offload {offload}", _worst(checks), demanded=True))
    return lines


def byte_line(what: str, check: ByteCheck, *, demanded: bool) -> Line:
    """One look at gathered bytes."""
    assert check.compared, "nothing was compared"
    measured = f"{check.differing:,} of {check.compared:,} bytes differ"
    if check.when != "in forward and recompute":
        measured += f", weights off {_percent(check.weight_error)}"
    if check.logit_error is not None:
        measured += f", logits off {_percent(check.logit_error)}"
    good = check.differing == 0 and check.weight_error == 0 and (check.logit_error or 0) <= LOGIT_LIMIT
    return Line(f"{what}: {check.when}", measured, good if demanded else None)


def training_lines(sharded: Training, plain: Training) -> list[Line]:
    """Two ranks against one process."""
    lines = []
    for dtype, reference in plain.by_dtype.items():
        found = sharded.by_dtype[dtype]
        loss_error = _worst_loss(found.losses, reference.losses)
        assert found.gradients.keys() == reference.gradients.keys(), "other parameters are trained"
        gradient_error = max(
            relative_error(found.gradients[name], gradient) for name, gradient in reference.gradients.items()
        )
        good = loss_error <= LOSS_LIMITS[dtype] and gradient_error <= GRADIENT_LIMITS[dtype]
        what = f"{RANKS} ranks against one process, {str(dtype).removeprefix('torch.')}"
        lines.append(Line(what, f"losses off {loss_error:.1e}, gradients off {gradient_error:.1e}", good))
    found, reference = sharded.fused_head_losses, plain.fused_head_losses
    loss_error = _worst_loss(found, reference)
    losses = " ".join(f"{loss:.4f}" for loss in found)
    measured = f"losses {losses}, off {loss_error:.1e} from one process"
    lines.append(Line("TRL's fused head, trained head", measured, loss_error <= 10 * LOSS_LIMITS[torch.float32]))
    return lines


def compile_line(compiled: Compiled) -> Line:
    """The layer was compiled as one graph, or there would be no figures."""
    measured = f"output off {compiled.output_error:.1e}, gradient off {compiled.gradient_error:.1e} from eager"
    good = max(compiled.output_error, compiled.gradient_error) <= GRADIENT_LIMITS[torch.float32]
    return Line("torch.compile, fullgraph", measured, good)


def _worst_loss(found: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True))


def _percent(error: float) -> str:
    return f"{error:.2%}" if error else "0"


def _worst(checks: Sequence[ByteCheck]) -> ByteCheck:
    return max(checks, key=lambda check: (check.differing, check.weight_error, check.logit_error or 0))


if __name__ == "__main__":
    main()
