"""The layering of DESIGN: imports point downwards, and each heavy library has one home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hf_fsdp_qlora"
LAYERS = [
    {"__init__"},
    {"errors", "distributed", "formats", "host_memory"},
    {
        "machine_problems",
        "precision",
        "resources",
        "goals",
        "qlora_arguments",
        "rotary_arguments",
        "config",
        "checkpoint",
        "checkpoint_writer",
        "safetensors_stream",
    },
    {
        "engine",
        "model_shape",
        "activations",
        "memory_settings",
        "memory",
        "planning",
        "memory_gathered",
        "memory_loading",
        "memory_host",
        "memory_step",
        "memory_visits",
        "memory_compiled",
        "memory_joined",
    },
    {"quantization"},
    {"row_ops", "outside"},
    {"sibling_ops"},
    {"linear", "base_checkpoint", "base_record", "saved_adapter", "merge_check"},
    {
        "validation",
        "validation_launch_rules",
        "validation_rules",
        "validation_rotary_rules",
        "validation_model_rules",
        "accelerate_config",
        "compiled_choice",
    },
    {"sharding", "skeleton", "matching", "lora_config", "layer_options"},
    {"allocation", "fsdp1", "fsdp1_state", "integrity", "report", "dora", "prequantized", "expand", "merge"},
    {"adapter_source", "export", "lora", "lora_layer", "siblings", "new_layers", "owners"},
    {"weights", "trainer_compat", "data"},
    {"callbacks", "quantize_checkpoint", "load_checks", "loading", "rotary", "train"},
    {"commands"},
    {"cli"},
]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def level(name: str) -> int:
    levels = [index for index, names in enumerate(LAYERS) if name in names]
    assert len(levels) == 1, f"{name} must stand in LAYERS once"
    return levels[0]


def test_imports_point_downwards() -> None:
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        own_level = level(own)
        for name in imported(path):
            other = name.removeprefix("hf_fsdp_qlora.").split(".")[0]
            if name.startswith("hf_fsdp_qlora.") and other != own:
                assert level(other) <= own_level, f"{path.name} imports {name}, which is above it"
                checked += 1
    assert checked > 200


def test_heavy_libraries_have_one_home() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = set(imported(path))
        if path.parent.name != "quantization":
            assert not any(name.split(".")[0] in ("bitsandbytes", "hqq") for name in names), path
        if path.name != "sharding.py":
            assert not any(name.startswith("torch.distributed.fsdp") for name in names), path
