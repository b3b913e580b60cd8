"""The layering of DESIGN: imports point downwards, and each heavy library has one home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hf_fsdp_qlora"
LAYERS = [
    {"errors"},
    {"distributed", "formats", "precision"},
    {"checkpoint", "memory", "config", "resources", "engine"},
    {"quantization"},
    {"linear"},
    {"sharding", "fsdp1"},
    {"integrity", "skeleton", "report", "export", "lora", "lora_config"},
    {"weights", "trainer_compat", "callbacks"},
    {"loading"},
    {"train", "commands"},
    {"cli"},
]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def level(name: str) -> int | None:
    return next((index for index, names in enumerate(LAYERS) if name in names), None)


def test_imports_point_downwards() -> None:
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(path):
            other = name.removeprefix("hf_fsdp_qlora.").split(".")[0]
            if name.startswith("hf_fsdp_qlora.") and other != own and level(own) is not None:
                below = level(other)
                assert below is None or below <= level(own), f"{path.name} imports {name}, which is above it"  # type: ignore[operator]
                checked += 1
    assert checked > 40


def test_heavy_libraries_have_one_home() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = set(imported(path))
        if path.parent.name != "quantization":
            assert not any(name.split(".")[0] in ("bitsandbytes", "hqq") for name in names), path
        if path.name not in ("sharding.py", "fsdp1.py"):
            assert not any(name.startswith("torch.distributed.fsdp") for name in names), path
