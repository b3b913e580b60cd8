"""Whether Triton can launch anything on this machine.

On first use it builds a small library with a C compiler and Python's headers (triton/runtime/build.py). Images that
are made to run torch, not to build for it, have Triton and neither; what needs Triton would then fail in the first
step. The look is at where Triton looks, in the same order; nothing is built.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path


def triton_lacks() -> str | None:
    """What Triton lacks, for a sentence after "Triton cannot launch kernels here:"; None if nothing is known."""
    if find_spec("triton") is None:
        return "it is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler (CC is not set, gcc and clang are not in PATH); install gcc"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not elsewhere and not Path(headers, "Python.h").exists():
        return f"there is no Python.h in {headers}; install Python's development files, such as python3-dev"
    return None
