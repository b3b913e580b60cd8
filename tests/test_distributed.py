"""What hf_fsdp_qlora.distributed promises about the end of a program."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.distributed import free_port

PROGRAM = """
import sys, threading, time
from hf_fsdp_qlora.engine import resolve_engine

assert resolve_engine("none") == "none" and resolve_engine("none") == "none"  # a second model changes nothing

def let_go():  # as a thread of gloo does, after the collective
    time.sleep(0.02)
    print("let go", flush=True)

threading.Thread(target=let_go, daemon=True).start()
"""


@pytest.mark.parametrize("has_group", [True, False])
def test_the_threads_of_a_process_group_finish_before_the_interpreter(has_group: bool) -> None:
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", **(group if has_group else {})}
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 0, result.stderr
    assert (result.stdout == "let go\n") == has_group
