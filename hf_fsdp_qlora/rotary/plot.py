"""A picture of a rotary run: its losses, and how much of the model had its turn by then.

    from hf_fsdp_qlora.rotary.plot import plot_run
    plot_run(trainer.state.log_history, "run.png")

Needs matplotlib, which nothing else in the package does (`pip install matplotlib`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hf_fsdp_qlora.errors import ConfigError

_LOSSES = {
    "loss": "training", "eval_loss": "evaluation, quantised blocks", "eval_masters_loss": "evaluation, masters",
}  # fmt: skip


def plot_run(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw losses over steps, and below them coverage and the lowest active block.

    Args:
        log_history: of the trainer's state, or of the `trainer_state.json` of a checkpoint.
        path: of the picture; its ending says which format.

    Raises:
        ConfigError: the log is not one of rotary training, or matplotlib is missing.
    """
    coverage = series(log_history, "rotary/coverage")
    if not coverage[0]:
        raise ConfigError("The log has no rotary/coverage: the run did not have rotary.callback among its callbacks.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plot_run needs matplotlib. Install it: pip install matplotlib.") from None
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, turns = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for key, label in _LOSSES.items():
        steps, values = series(log_history, key)
        if steps:
            losses.plot(steps, values, label=label, marker="." if key.startswith("eval") else None)
    losses.set_ylabel("loss")
    losses.legend()
    turns.plot(*coverage, color="tab:green")
    turns.set_ylabel("share trained so far", color="tab:green")
    turns.set_ylim(0, 1.05)
    turns.set_xlabel("step")
    blocks = turns.twinx()
    blocks.step(*series(log_history, "rotary/lowest_active_block"), where="post", color="tab:gray", linewidth=0.8)
    blocks.set_ylabel("lowest active block", color="tab:gray")
    figure.savefig(path)


def series(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps at which a value was logged, and the values."""
    entries = [entry for entry in log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]
