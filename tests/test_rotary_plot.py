"""The picture of a run: drawn from a log as the Trainer keeps it, refused where there is nothing to draw."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.rotary.plot import plot_run, series

LOG = [
    {"step": 1, "loss": 5.0, "rotary/coverage": 0.2, "rotary/lowest_active_block": 3},
    {"step": 2, "eval_loss": 4.9},
    {"step": 2, "eval_masters_loss": 4.8},
    {"step": 3, "loss": 4.5, "rotary/coverage": 0.6, "rotary/lowest_active_block": 1},
]


def test_a_run_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_run(LOG, tmp_path / "run.svg")
    svg = (tmp_path / "run.svg").read_text()
    assert svg.count('id="line2d_') > 10 and "evaluation, masters" in svg
    assert series(LOG, "loss") == ([1, 3], [5.0, 4.5])


def test_a_log_without_rotation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rotary.callback"):
        plot_run([{"step": 1, "loss": 5.0}], tmp_path / "run.png")


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plot_run(LOG, tmp_path / "run.png")
