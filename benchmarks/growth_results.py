"""Rows of growth.py: where they are kept, and how they are shown. A row that another script measured may lack
the host's memory (None)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTINGS = ("device", "gpus", "vocab_size", "seq_len", "batch_size")
_COLUMNS = ("shape", "parameters", "ranks", "gpus", "load s", "host above shard GiB", "GPU loading GiB",
           "GPU training GiB", "s per step", "tok/s", "losses")  # fmt: skip
PANELS = {
    "load_s": "load, s", "host_gib": "host memory above the shard while loading, GiB",
    "gpu_training_gib": "GPU memory per rank, training, GiB", "step_s": "s per step",
}  # fmt: skip
HEADER = "| " + " | ".join(_COLUMNS) + " |\n" + "| --- " * len(_COLUMNS) + "|"


def read(results: Path) -> list[dict[str, Any]]:
    """All rows so far, by device, settings, ranks and size."""
    rows = [json.loads(text) for text in results.read_text().splitlines()] if results.exists() else []
    return sorted(rows, key=lambda row: (*(str(row[name]) for name in SETTINGS), row["ranks"], row["parameters"]))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    tokens = row["ranks"] * row["batch_size"] * row["seq_len"] / row["step_s"]
    host = "" if row["host_gib"] is None else f"{row['host_gib']:.2f}"
    return (
        f"| {row['shape']} | {row['parameters'] / 1e9:.2f}e9 | {row['ranks']} | {row['gpus']} | {row['load_s']:.1f} | "
        f"{host} | {row['gpu_loading_gib']:.2f} | {row['gpu_training_gib']:.2f} | "
        f"{row['step_s']:.3f} | {tokens:,.0f} | {', '.join(f'{loss:.3f}' for loss in row['losses'])} |"
    )


def plot(rows: Iterable[dict[str, Any]], path: str) -> None:
    """Four panels over the number of parameters, a line for each device and number of ranks."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "font.size": 8})
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}, {row['gpus']} x {row['device']}"
        lines.setdefault(name, []).append(row)
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.5), layout="constrained")
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        for name, points in lines.items():
            sizes = [row["parameters"] / 1e9 for row in points]
            values = [math.nan if row[key] is None else row[key] for row in points]
            axis.plot(sizes, values, marker="o", markersize=3, linewidth=1, label=name)
        axis.set(title=title, xlabel="parameters, 1e9", xlim=(0, None), ylim=(0, None))
    axes.flat[0].legend()
    figure.savefig(path)
