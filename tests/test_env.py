"""What `env` says of this machine, and which machines it warns of."""

from __future__ import annotations

import argparse
import json
import resource
from typing import Any

import pytest
import torch

from hf_fsdp_qlora.commands import env
from hf_fsdp_qlora.machine_problems import RULES, find_problems

GPU = dict(name="NVIDIA H100", memory_gib=79.1, free_gib=79.0, compute_capability="9.0")
GOOD: dict[str, Any] = {
    "packages": {"torch": "2.11.0+cu130", "transformers": "5.17.0"},
    "system": {"platform": "Linux-6.8.0-x86_64", "torch_cuda": "13.0"},
    "gpus": [GPU, GPU], "free": {"shared_memory_gib": 8.0},
}  # fmt: skip
BAD: dict[str, dict[str, Any]] = {
    "versions_are_new_enough": {"packages": {"torch": "2.10.1", "transformers": "5.17.0"}},
    "torch_sees_the_gpus": {"gpus": []},
    "gpus_compute_in_bfloat16": {"gpus": [dict(GPU, name="Tesla T4", compute_capability="7.5")] * 2},
    "triton_can_launch": {"system": GOOD["system"] | {"triton_lacks": "there is no C compiler"}},
    "gpus_are_alike": {"gpus": [GPU, dict(GPU, name="NVIDIA A100")]},
    "shared_memory_is_large_enough": {"free": {"shared_memory_gib": 0.1}},
    "kernel_is_new_enough": {"system": {"platform": "Linux-4.18.0-x86_64", "torch_cuda": "13.0"}},
    "cards_can_talk": {},
}


@pytest.fixture
def p2p(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate finds out about the cards; there are none here."""
    monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", lambda: True)


def test_every_problem_is_found_alone(p2p: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_problems(GOOD) == []
    assert BAD.keys() == {rule.__name__ for rule in RULES}
    for rule in RULES:
        if rule.__name__ == "cards_can_talk":
            monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", lambda: False)
        assert find_problems({**GOOD, **BAD[rule.__name__]}) == [rule({**GOOD, **BAD[rule.__name__]})], rule.__name__


def test_one_gpu_needs_no_links(p2p: None) -> None:
    assert find_problems({**GOOD, "gpus": [GPU], "free": {"shared_memory_gib": 0.1}}) == []


def test_command_prints_every_section_in_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    env.register(parser.add_subparsers())
    assert env.run(parser.parse_args(["env", "--json"])) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["packages", "system", "gpus", "links", "free", "limits", "problems"]
    # Not every build has its "+cu130" in the package's version, too.
    assert facts["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["free"]["disk_hub_cache_gib"] > 0 and facts["limits"]["open_files"] > 0
    assert env.run(parser.parse_args(["env"])) == 0
    text = capsys.readouterr().out
    for section in facts:
        assert f"{section}:\n" in text


def test_locked_memory_is_what_ulimit_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, shown in ((2**28, 0.25), (resource.RLIM_INFINITY, "unlimited")):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert env._limits()["locked_memory_gib"] == shown


def test_links_are_nvidia_smis_lines_without_its_colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nprintf '\\t\\033[4mGPU0\\tGPU1\\033[0m\\nGPU0\\t X \\tNV18\\n\\n'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert env._links() == ["        GPU0    GPU1", "GPU0     X      NV18"]
