"""Two hosts on one machine: two `accelerate launch`, as users start them, that meet at the first one's address.

In two network namespaces they share no loopback and no host name, only a cable between them, so that whatever takes
the other host for this one fails. Where namespaces may not be made (they need root), the same runs on 127.0.0.1.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_fsdp_qlora.resources import find_accelerate_config
from hf_fsdp_qlora.validation import find_problems
from tests.distributed import free_port
from tests.tiny_models import save_tiny_model
from tests.trainer_story import adapter, launch, train

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.99.0.1", "10.99.0.2")
TIMEOUT_S = 240


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def namespaces() -> Iterator[list[tuple[str, str]]]:
    """(namespace, interface) of two hosts with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command (iproute2)")
    names = [(f"hosts{os.getpid()}{letter}", f"v{os.getpid() % 100000}{letter}") for letter in "ab"]
    made = []
    try:
        try:
            for namespace, _ in names:
                ip("netns", "add", namespace)
                made.append(namespace)
            (first, one), (second, other) = names
            ip("link", "add", one, "netns", first, "type", "veth", "peer", "name", other, "netns", second)
            for (namespace, interface), address in zip(names, ADDRESSES, strict=True):
                ip("-n", namespace, "addr", "add", f"{address}/24", "dev", interface)
                for device in (interface, "lo"):
                    ip("-n", namespace, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield names
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "del", namespace], check=False)


def config_for_cpu(folder: Path) -> Path:
    """accelerate_configs/multi_node.yaml for two hosts of two CPU processes."""
    values = yaml.safe_load(find_accelerate_config("multi_node").read_text())
    values |= dict(num_processes=4, use_cpu=True, mixed_precision="no")
    values["parallelism_config"]["parallelism_config_dp_shard_size"] = 2
    assert find_problems(values, dict(use_peft=True, dtype="float32", bf16=False)).problems == []
    path = folder / "two_hosts.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_hosts(model: Path, folder: Path, hosts: list[tuple[list[str], str]], address: str) -> list[dict[str, Any]]:
    """Start one launcher per host, each with a checkpoint of its own.

    Args:
        hosts: what a command begins with to run there, and its network interface.
        address: of the first host.

    Returns:
        What each rank reported.
    """
    config, port, processes = config_for_cpu(folder), free_port(), []
    for machine_rank, (prefix, interface) in enumerate(hosts):
        copy = folder / f"disk{machine_rank}"
        shutil.copytree(model, copy)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "GLOO_SOCKET_IFNAME": interface, "TP_SOCKET_IFNAME": interface, "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        command = [
            *prefix, sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
            "--machine_rank", str(machine_rank), "--main_process_ip", address, "--main_process_port", str(port),
            str(ROOT / "tests/host_story.py"), str(copy), str(folder / "out"), str(folder),
        ]  # fmt: skip
        with open(folder / f"host{machine_rank}.log", "w") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    try:
        statuses = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"host{index}.log").read_text()[-3000:] for index in range(len(hosts)))
    assert statuses == [0, 0], logs
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


def assert_as_one_process(ranks: list[dict[str, Any]], model: Path, folder: Path) -> None:
    """The run equals one process, and each host read its own copy of the checkpoint once."""
    weights = sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
    run: dict[str, Any] = dict(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2, learning_rate=1e-3
    )
    [expected] = launch("one-process", train, str(model), str(folder / "one"), **run)
    for host in (ranks[:2], ranks[2:]):
        assert sum(rank["read_bytes"] for rank in host) == weights
    for rank in ranks:
        assert rank["mesh"] == [2, 2]
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-6)  # sums in another order
    saved, whole = adapter(folder / "out" / "checkpoint-2"), adapter(folder / "one" / "checkpoint-2")
    assert saved.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(saved[key], value, rtol=0, atol=2e-6, msg=key)


def test_two_hosts_in_namespaces_train_as_one_process(namespaces: list[tuple[str, str]], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", dtype=torch.float32)
    hosts = [(["ip", "netns", "exec", namespace], interface) for namespace, interface in namespaces]
    assert_as_one_process(run_hosts(model, tmp_path, hosts, ADDRESSES[0]), model, tmp_path)


@pytest.mark.slow
def test_two_groups_of_processes_on_loopback_train_as_one_process(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", dtype=torch.float32)
    assert_as_one_process(run_hosts(model, tmp_path, [([], "lo"), ([], "lo")], "127.0.0.1"), model, tmp_path)
