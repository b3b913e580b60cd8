"""The table of rotary_sweep.py's rows: what kind of run each is, and the best learning rate of each kind."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

TARGET = 3.45

Row = dict[str, Any]
"""What `run_job` returns."""


def describe(row: Row) -> str:
    """The row of the table that a run belongs to, seed and learning rate aside."""
    if row["method"] == "full":
        return "full AdamW"
    if row["method"] == "lora":
        return f"LoRA r={row['rank']}"
    parts = ["fixed subset" if row["method"] == "fixed" else "rotary", row["frozen"], f"{row['layers']} of 6 layers"]
    if row["method"] == "rotary":
        parts += [row["moments"], f"{row['steps_per_block']} steps"]
        parts += [f"{row['warmup']} of them warm-up"] * (row["warmup"] > 0)
    parts += ["+ " + " ".join(row["always_active"])] + ["fp32 weights"] * (row["dtype"] == "float32")
    return ", ".join(parts)


def table(rows: Iterable[Row], steps: int) -> str:
    """Markdown: the best learning rate of each kind of run, mean and spread over its seeds."""
    kinds: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        kinds[describe(row)][row["lr"]].append(row)
    lines = [
        f"| run | trained at a time | lr (tried) | seeds | eval loss at {steps} | spread | on the device's model |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    means: dict[str, float] = {}
    seeds: dict[str, int] = {}
    for kind, rates in sorted(kinds.items()):
        most = seeds[kind] = max(len(of_rate) for of_rate in rates.values())
        lr = min((rate for rate in rates if len(rates[rate]) == most), key=lambda rate: mean_loss(rates[rate]))  # noqa: B023
        losses = [final_loss(row) for row in rates[lr]]
        means[kind] = mean_loss(rates[lr])
        on_device = [loss for row in rates[lr] for step, loss in row["device_losses"].items() if int(step) == steps]
        tried = ", ".join(f"{rate:.1e}" for rate in sorted(rates))
        columns = [
            kind, f"{rates[lr][0]['trained'] / 1e6:.2f}M", f"{lr:.1e} ({tried})",
            str(most), f"{means[kind]:.4f}", f"{max(losses) - min(losses):.4f}",
            f"{statistics.fmean(on_device):.4f}" if on_device else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(columns) + " |")
    int8 = {kind: loss for kind, loss in means.items() if kind.startswith("rotary, int8")}
    int8 = {kind: loss for kind, loss in int8.items() if seeds[kind] == max(seeds[other] for other in int8)}
    if int8:
        best = min(int8, key=int8.__getitem__)
        verdict = "reached" if int8[best] <= TARGET else "missed"
        lines.append(f"\nbest with int8: {best}, {int8[best]:.4f}; {TARGET} is {verdict}")
    return "\n".join(lines)


def final_loss(row: Row) -> float:
    """Of the weights that would be saved; a run that diverged is the worst."""
    loss = row["losses"][max(row["losses"], key=int)]
    return loss if loss == loss else float("inf")


def mean_loss(rows: Iterable[Row]) -> float:
    return statistics.fmean(map(final_loss, rows))
