"""`hf-fsdp-qlora env`: versions, devices, links, memory, disk and limits, to paste into an issue.

No paths, no host name. What is known not to work together comes last, each with what to do (machine_problems.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
from importlib import metadata
from typing import Any

PACKAGES = (
    "hf-fsdp-qlora", "torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "hqq", "datasets",
    "safetensors", "tokenizers", "huggingface_hub", "triton", "flash-attn",
)  # fmt: skip
GIB = 2**30
SHM = "/dev/shm"


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = subparsers.add_parser("env", help="versions and hardware, to paste into an issue", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="as JSON, for a program")


def run(args: argparse.Namespace) -> int | None:
    """Print the facts."""
    facts = environment()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for section, values in facts.items():
        print(f"{section}:")
        if not values:
            print("  none")
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"  {key}: {shown}")
    return 0


def environment() -> dict[str, Any]:
    """Versions by package (None: not installed), the system, GPUs and the links between them, free space, limits, and
    problems that are known; sizes in GiB."""
    from hf_fsdp_qlora.machine_problems import find_problems

    facts = {
        "packages": _versions(), "system": _system(), "gpus": _gpus(), "links": _links(), "free": _free(),
        "limits": _limits(),
    }  # fmt: skip
    return {**facts, "problems": find_problems(facts)}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _system() -> dict[str, Any]:
    import psutil
    import torch

    from hf_fsdp_qlora.quantization import triton_lacks

    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "torch_cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "triton_lacks": triton_lacks(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, _ = torch.cuda.mem_get_info(index)
        gpus.append({
            "name": properties.name,
            "memory_gib": round(properties.total_memory / GIB, 1),
            "free_gib": round(free_bytes / GIB, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
        })  # fmt: skip
    return gpus


def _links() -> list[str]:
    """The lines of `nvidia-smi topo -m`; none where there are no two NVIDIA GPUs."""
    import torch

    if torch.cuda.device_count() < 2 or shutil.which("nvidia-smi") is None:
        return []
    found = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60)
    text = re.sub("\x1b\\[[0-9;]*m", "", found.stdout)  # it underlines its header
    return [line.expandtabs() for line in text.splitlines() if line.strip()]


def _limits() -> dict[str, float | int | str]:
    """What one process may lock in memory and open, as `ulimit -l` and `ulimit -n` say."""
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = locked == resource.RLIM_INFINITY
    return {"locked_memory_gib": "unlimited" if unlimited else round(locked / GIB, 3), "open_files": files}


def _free() -> dict[str, float]:
    import psutil
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    while not os.path.isdir(cache):
        cache = os.path.dirname(cache)
    shared = {"shared_memory_gib": round(shutil.disk_usage(SHM).free / GIB, 1)} if os.path.isdir(SHM) else {}
    return {
        **shared,
        "memory_gib": round(psutil.virtual_memory().available / GIB, 1),
        "disk_here_gib": round(shutil.disk_usage(".").free / GIB, 1),
        "disk_hub_cache_gib": round(shutil.disk_usage(cache).free / GIB, 1),
    }
