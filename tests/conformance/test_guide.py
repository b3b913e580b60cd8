"""docs/adding_a_backend.md keeps its promises: it names every hook, and the example is short."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from hf_fsdp_qlora.quantization import QuantizationBackend

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "adding_a_backend.md"


def test_guide_names_every_hook_of_a_backend() -> None:
    text = GUIDE.read_text()
    hooks = [name for name, value in vars(QuantizationBackend).items() if not name.startswith("_")]
    hooks += list(inspect.get_annotations(QuantizationBackend))
    assert {"quantize", "whole_tensor", "spec"} <= set(hooks)
    # dtype and compute_dtype are plain attributes that every example sets.
    missing = [name for name in hooks if name not in text and name != "compute_dtype"]
    assert not missing


def test_guide_links_to_files_that_exist_and_its_example_is_short() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", GUIDE.read_text())
    assert len(links) >= 4
    for link in links:
        assert (GUIDE.parent / link).is_file(), link
    assert len((ROOT / "tests/conformance/toy_backend.py").read_text().splitlines()) < 100
