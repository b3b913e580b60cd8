"""Start ranks of a benchmark from the benchmark itself, with the environment that `accelerate launch` would set.

One command then runs a whole measurement, and an error in one rank ends all of them with that rank's traceback
(`torch.multiprocessing` sees to it). Every run gets fresh processes: accelerate keeps its state for the life of one.
"""

from __future__ import annotations

import os
import pickle
import platform
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

FSDP2_ENV = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What the shipped fsdp2.yaml makes `accelerate launch` set."""

COLLECTIVE_TIMEOUT = timedelta(minutes=5)
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    world_size: int,
    env: dict[str, str] | None = None,
    process_group: bool = True,
    collective_timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> list[Any]:
    """Call `function(*args)` on `world_size` fresh processes and wait for them.

    On CUDA, ranks that outnumber the GPUs share them: NCCL refuses that on one host, so each rank then claims a host
    of its own. Without CUDA the ranks run on the CPU, one thread each, as under torchrun.

    Args:
        function: a module-level function of the benchmark.
        env: further environment variables of the ranks, such as `FSDP2_ENV`.
        process_group: open one before the call; False starts a plain process that knows nothing of a launcher.
        collective_timeout: after which a collective that some rank does not join is an error.

    Returns:
        What each rank returned (picklable), by rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; the message is its traceback.
    """
    if not process_group and world_size != 1:
        raise ValueError(f"{world_size} processes without a process group; only one can do without")
    port = _free_port() if process_group else None
    with tempfile.TemporaryDirectory() as results:
        mp.spawn(_run_rank, (world_size, port, collective_timeout, env or {}, results, function, args), world_size)
        return [pickle.loads(_result_file(results, rank).read_bytes()) for rank in range(world_size)]


def describe_machine() -> str:
    """One line: device, cores, versions, as RESULTS.md needs them."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        device = f"CPU ({_cpu_name()}), {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{device}; Python {platform.python_version()}, {versions}"


def _run_rank(
    rank: int,
    world_size: int,
    port: int | None,
    collective_timeout: timedelta,
    env: dict[str, str],
    results: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    cuda = torch.cuda.is_available()
    os.environ.update(env, TOKENIZERS_PARALLELISM="false")
    if not cuda:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.set_num_threads(1)
    if port is not None:
        _join_group(rank, world_size, port, collective_timeout, cuda)
    _result_file(results, rank).write_bytes(pickle.dumps(function(*args)))
    if port is not None:  # not after an error: closing the group could wait for a rank that waits for this one
        dist.destroy_process_group()


def _join_group(rank: int, world_size: int, port: int, timeout: timedelta, cuda: bool) -> None:
    num_gpus = torch.cuda.device_count()
    local_rank = rank % num_gpus if cuda else rank
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    if cuda:
        torch.cuda.set_device(local_rank)
        if world_size > num_gpus:
            os.environ.update(NCCL_HOSTID=f"rank{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=timeout)


def _result_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pickle"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    return names[0] if names else platform.machine()
