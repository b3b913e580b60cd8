"""HSDP: two replicas of two ranks. Rows are split inside a replica and equal in both; training equals one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_fsdp_qlora import QuantizedLinear, load_model
from hf_fsdp_qlora.linear import as_bytes
from hf_fsdp_qlora.quantization import LinearInt8Config
from hf_fsdp_qlora.sharding import local_tensor
from tests.distributed import run_distributed
from tests.loading_story import LORA, nf4
from tests.tiny_models import save_tiny_model
from tests.trainer_story import adapter, assert_equal, launch, launch_env, train

CPU = {"ACCELERATE_USE_CPU": "true"}


def hsdp(replicas: int, shards: int) -> dict[str, str]:
    """What `accelerate launch` sets for a `parallelism_config` (accelerate/utils/launch.py)."""
    sizes = {"DP_REPLICATE": replicas, "DP_SHARD": shards, "TP": 1, "CP": 1, "SP": 1}
    env = {f"PARALLELISM_CONFIG_{name}_SIZE": str(size) for name, size in sizes.items()}
    return {**launch_env("fsdp2", wrap="NO_WRAP"), **CPU, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", **env}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.float32))


def _load(path: str, config: Any) -> dict[str, Any]:
    model = load_model(path, quantization_config=config, peft_config=LORA, dtype=torch.float32)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    ids = torch.arange(60).view(3, 20)
    return {
        "placements": {str(p.placements) for p in model.parameters() if isinstance(p, DTensor)},
        "plain": [name for name, p in model.named_parameters() if not isinstance(p, DTensor)],
        "parts": {name: as_bytes(local_tensor(p).contiguous()).clone() for name, p in model.named_parameters()},
        "weights": {name: m.dequantize() for name, m in layers},
        "loss": model(input_ids=ids, labels=ids).loss.item(),
        "read_bytes": model.load_report.read_bytes,
    }


def _hqq() -> Any:
    from transformers import HqqConfig

    return HqqConfig(nbits=4, group_size=64)


@pytest.mark.parametrize("make_config", [nf4, LinearInt8Config, _hqq], ids=["nf4", "int8", "hqq"])
def test_each_replica_holds_and_reads_what_one_process_would(make_config: Any, model_path: str) -> None:
    [one] = run_distributed(_load, model_path, make_config(), world_size=1, env=CPU, process_group=False)
    ranks = run_distributed(_load, model_path, make_config(), world_size=4, env=hsdp(2, 2), process_group=False)
    for rank in ranks:
        assert rank["plain"] == [] and {str((Replicate(), Shard(0)))} <= rank["placements"]
        assert rank["loss"] == one["loss"]
        assert all(torch.equal(rank["weights"][name], weight) for name, weight in one["weights"].items())
    for here, there in zip(ranks[:2], ranks[2:], strict=True):
        assert all(torch.equal(here["parts"][name], value) for name, value in there["parts"].items())
    for name, whole in one["parts"].items():
        if "lora" not in name:  # some of those are split along columns
            assert torch.equal(torch.cat([rank["parts"][name] for rank in ranks[:2]]), whole), name
    # A replica is a node: its ranks together read every tensor once.
    for replica in (ranks[:2], ranks[2:]):
        assert sum(rank["read_bytes"] for rank in replica) == one["read_bytes"]


def _load_own(paths: list[str]) -> str:
    """The error of a load in which ranks 2 and 3, the second node, read another folder."""
    with pytest.raises(RuntimeError) as error:
        load_model(paths[dist.get_rank() // 2], quantization_config=nf4(), dtype=torch.float32)
    return str(error.value)


@pytest.mark.parametrize("changed", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nodes_with_different_checkpoints_are_refused(changed: str, model_path: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_path, other)
    tensors = load_file(other / "model.safetensors")
    tensors[changed][0] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    errors = run_distributed(_load_own, [model_path, str(other)], world_size=4, env=hsdp(2, 2))
    assert all("the first is " + changed in error and "same checkpoint" in error for error in errors)


RUN: dict[str, Any] = dict(max_steps=4, gradient_accumulation_steps=2, learning_rate=1e-3, lora=dict(r=2))
"""r=2 over 2 shards: whole rows. The dataset's 32 samples are 4 steps of 8."""


@pytest.mark.parametrize(
    "state_dict_type", ["FULL_STATE_DICT", pytest.param("SHARDED_STATE_DICT", marks=pytest.mark.slow)]
)
def test_training_agrees_with_one_process_and_resumes(state_dict_type: str, model_path: str, tmp_path: Path) -> None:
    """fp32, accumulation 2, clipping at every step. What differs is the order of float32 sums."""
    env = {**hsdp(2, 2), "FSDP_STATE_DICT_TYPE": state_dict_type}

    def four_ranks(name: str, resume: str | None = None) -> list[dict[str, Any]]:
        return run_distributed(
            train, model_path, str(tmp_path / name), per_device_train_batch_size=1, resume=resume, use_cpu=True,
            world_size=4, env=env, process_group=False, **RUN,
        )  # fmt: skip

    whole = four_ranks("four")
    [expected] = launch("one-process", train, model_path, str(tmp_path / "one"), per_device_train_batch_size=4, **RUN)
    for rank in whole:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert rank["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-5)
    assert min(expected["grad_norms"]) > 0.1, "clipping did not happen at every step"
    four, one = adapter(tmp_path / "four" / "final"), adapter(tmp_path / "one" / "final")
    assert four.keys() == one.keys()
    for key, value in one.items():
        torch.testing.assert_close(four[key], value, rtol=0, atol=2e-6, msg=key)
    resumed = four_ranks("again", str(tmp_path / "four" / "checkpoint-2"))
    assert resumed[0]["losses"] == whole[0]["losses"]
    assert_equal(adapter(tmp_path / "again" / "final"), four)
