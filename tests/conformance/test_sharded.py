"""What every backend must hold through `load_model`: any number of ranks, any engine, the same weights and bytes.

One launch per engine loads every case in turn, because starting ranks costs more than what they do here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from hf_fsdp_qlora import QuantizedLinear, load_model
from hf_fsdp_qlora.integrity import check_integrity
from hf_fsdp_qlora.sharding import local_tensor
from tests.conformance.cases import CASES, EVERY_CASE
from tests.distributed import run_distributed
from tests.tiny_models import save_tiny_model

CPU = {"ACCELERATE_USE_CPU": "true"}
FSDP2 = {**CPU, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# Weights of one to six rows: on three ranks some own nothing, some one row less than others.
# FSDP1 shards later, when a trainer wraps the model: tests/test_fsdp1.py puts every case through that, and
# tests/test_fsdp1_offload.py with offload.
ENGINES = {
    "one process": (1, CPU),
    "ddp, 2 ranks": (2, CPU),
    "fsdp2, 1 rank": (1, FSDP2),
    "fsdp2, 2 ranks": (2, FSDP2),
    "fsdp2, 3 ranks": (3, FSDP2),
    "fsdp2, 2 ranks, offload": (2, {**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}),
}


def load_train_and_look(path: str, names: list[str]) -> dict[str, Any]:
    """For every case: each layer's weight, the rows compared after training, and whether local bytes changed."""
    found = {}
    for name in names:
        config = CASES[name].make_config()
        model = load_model(path, quantization_config=config, peft_config=LoraConfig(r=4, target_modules="all-linear"))
        layers = {
            key.removeprefix("base_model.model.").removesuffix(".base_layer"): module
            for key, module in model.named_modules()
            if isinstance(module, QuantizedLinear)
        }
        dense = {key: layer.dequantize() for key, layer in layers.items()}
        before = local_bytes(layers)
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ids = torch.arange(40).view(2, 20)
        losses = []
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] < losses[0], "adapters learn through the layer"
        assert all(torch.equal(old, new) for old, new in zip(before, local_bytes(layers), strict=True))
        found[name] = (dense, check_integrity(model), losses[0])
    return found


def local_bytes(layers: dict[str, QuantizedLinear]) -> list[Tensor]:
    rows = [parameter for layer in layers.values() for parameter in (layer.weight, layer.weight_stats)]
    return [local_tensor(parameter).view(torch.uint8).clone() for parameter in rows]


def names_to_run() -> list[str]:
    """The cases that are not skipped on this machine."""
    return [name for name, case in CASES.items() if not any(mark.args[0] for mark in case.marks)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("conformance"), "llama")


@pytest.fixture(scope="module", params=ENGINES)
def ranks(request: pytest.FixtureRequest, checkpoint: Path) -> list[dict[str, Any]]:
    world_size, env = ENGINES[request.param]
    return run_distributed(
        load_train_and_look, str(checkpoint), names_to_run(), world_size=world_size, env=env,
        process_group="ACCELERATE_USE_FSDP" in env or world_size > 1,
    )  # fmt: skip


@EVERY_CASE
def test_every_rank_has_the_weights_of_the_library_and_no_byte_changes(
    name: str, ranks: list[dict[str, Any]], checkpoint: Path
) -> None:
    torch.set_num_threads(1)  # as the ranks have it
    source = load_file(checkpoint / "model.safetensors")
    for rank in ranks:
        dense, rows_compared, loss = rank[name]
        assert len(dense) == 14 and rows_compared >= 14
        for key, weight in dense.items():
            assert torch.equal(weight, CASES[name].reference(source[f"{key}.weight"])), key
        # The same weights and one kernel: equal, not close.
        assert loss == ranks[0][name][2]
