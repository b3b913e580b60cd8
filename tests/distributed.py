"""Run a function on several gloo processes and get its results back.

A fork server that has imported the heavy libraries once forks every rank, so a two-process test costs the work it
does and not twenty seconds of imports, and no state is left over between tests.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

PRELOAD = ["torch", "torch.distributed.fsdp", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "datasets"]
_context = multiprocessing.get_context("forkserver")
if torch.cuda.is_available():  # libraries open the GPU when they are imported, and CUDA does not survive a fork
    _context = multiprocessing.get_context("spawn")  # type: ignore[assignment]
_context.set_forkserver_preload([*PRELOAD, "transformers.models.llama.modeling_llama", "trl.trainer.sft_trainer"])


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_distributed(
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    env: dict[str, str] | None = None,
    process_group: bool = True,
    timeout_s: float = 240,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` on `world_size` fresh processes, as a launcher would.

    Args:
        function: importable by name (a module-level function of a test file).
        env: further environment variables, such as the ones `accelerate launch` sets.
        process_group: open a gloo group before the call; False leaves that to the code under test.

    Returns:
        What each rank returned, by rank.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or did not finish in time.
    """
    port = free_port()
    pipes: list[Connection] = []
    processes = []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        launch_env = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {}),
        }  # fmt: skip
        process = _context.Process(
            target=_run_rank, args=(theirs, function, args, kwargs, launch_env, process_group), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, processes, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], processes: list[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=timeout_s)
        assert ready, f"ranks {sorted(set(range(len(pipes))) - set(results))} did not finish in {timeout_s} s"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(5)
                raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            assert ok, f"rank {rank} of {len(pipes)} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(pipe: Connection, function: Callable, args: tuple, kwargs: dict, env: dict, process_group: bool) -> None:
    os.environ.update(env)
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if process_group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=120))
        pipe.send_bytes(pickle.dumps((True, function(*args, **kwargs))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.close()
