"""The notebooks, run as a reader runs them: every cell, in a kernel of its own, with the tiny model they build."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.rglob("*.ipynb"))
# Run after the last cell, in the same kernel: what the plots show.
CHECK_PLOTS = """
for axes, names in ((losses, ["training", "held out"]), (memory, None)):
    assert axes.lines, axes.get_title()
    for line in axes.lines:
        assert len(line.get_xdata()) >= 3 and min(line.get_ydata()) > 0, (axes.get_title(), line.get_label())
    if names:
        assert [line.get_label() for line in axes.lines] == names
print("lines of memory:", len(memory.lines))
"""


def run_notebook(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """Run a notebook in `folder`. Returns what it printed, and how many images it showed."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK_PLOTS))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the other tests: threads that wait for each other stall a busy CI
    client = NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def held_out_losses(printed: str) -> tuple[float, float]:
    found = re.search(r"held-out loss ([0-9.]+) -> ([0-9.]+)", printed)
    assert found, printed
    return float(found[1]), float(found[2])


def test_there_are_two_notebooks_and_they_are_kept_without_outputs() -> None:
    assert [path.name for path in NOTEBOOKS] == ["qlora_single_device.ipynb", "qlora_two_processes.ipynb"]
    for path in NOTEBOOKS:
        for cell in code_cells(nbformat.read(path, as_version=4)):
            assert cell.outputs == [] and cell.execution_count is None, path.name


def test_single_device_notebook_trains_plots_and_reloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, images = run_notebook("qlora_single_device.ipynb", tmp_path, monkeypatch)
    before, after = held_out_losses(printed)
    assert after < before
    # The same adapter over the same 4-bit bytes, on the same device: equal to the printed digits.
    assert f"held-out loss of the saved adapter {after:.3f}" in printed
    assert "14 linear layers quantised" in printed
    assert images == 2


def test_two_process_notebook_trains_shards_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, images = run_notebook("qlora_two_processes.ipynb", tmp_path, monkeypatch)
    before, after = held_out_losses(printed)
    assert after < before
    held = re.search(r"rank 0 holds ([0-9.]+) of ([0-9.]+) MiB", printed)
    assert held and 0.4 < float(held[1]) / float(held[2]) < 0.6
    assert "lines of memory: 2" in printed
    assert images == 1
    (adapter,) = tmp_path.rglob("adapter_model.safetensors")
    assert adapter.stat().st_size > 0
