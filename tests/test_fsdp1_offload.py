"""FSDP1 with offloaded units. torch pins what it offloads, which needs an accelerator: `load_model` refuses it on the
CPU, and here pinning does nothing, so that the rest of torch's path runs. Reference: the same without offload."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fsdp_qlora import fsdp1
from hf_fsdp_qlora.engine import check_offload
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.export import gather_adapter
from hf_fsdp_qlora.integrity import check_integrity
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.loading import load_model
from hf_fsdp_qlora.precision import resolve_precision
from hf_fsdp_qlora.sharding import FullyShardedDataParallel
from hf_fsdp_qlora.skeleton import decoder_layers
from tests.conformance.cases import CASES
from tests.conformance.test_sharded import names_to_run
from tests.distributed import run_distributed
from tests.loading_story import CPU, LORA, batch, nf4, plain_name
from tests.test_fsdp1 import FSDP1, weights_of
from tests.tiny_models import save_tiny_model


def train(path: str, offload: Any, use_orig_params: bool) -> dict[str, Any]:
    """Three steps with clipping; what each unit offloads, and the adapter in the end."""
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    torch.cpu.Stream.synchronize = lambda _: None  # type: ignore[attr-defined]
    model: Any = load_model(path, quantization_config=nf4(), peft_config=LORA, precision="fp32")
    precision, device = resolve_precision("fp32"), torch.device("cpu")
    layers = decoder_layers(model.get_base_model())
    arguments = fsdp1.unit_arguments(model, layers, precision=precision, offload=offload, device=device)
    root: Any = fsdp1.wrap(model, arguments, use_orig_params=use_orig_params)
    root.train()
    optimizer = torch.optim.AdamW([p for p in root.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = root(**batch()).loss
        loss.backward()
        root.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    handles: list[Any] = [unit._handle for unit in FullyShardedDataParallel.fsdp_modules(root) if unit is not root]
    offloads = {(handle.flat_param.requires_grad, handle._offload_params) for handle in handles if handle is not None}
    return {
        "losses": losses, "rows": check_integrity(root), "adapter": gather_adapter(model), "offloads": offloads,
        "root": root._handle._offload_params,
    }  # fmt: skip


@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "orig"])
def test_offloaded_units_train_as_without_offload(use_orig_params: bool, tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path, "llama"))
    plain, base, everything = (
        run_distributed(train, path, offload, use_orig_params, env=FSDP1) for offload in ("none", "base", "all")
    )
    # (trained, offloaded) of the units inside the root; the root holds embeddings and head.
    assert plain[0]["offloads"] == {(True, False), (False, False)} and not plain[0]["root"]
    assert base[0]["offloads"] == {(True, False), (False, True)} and not base[0]["root"]
    assert everything[0]["offloads"] == {(True, True), (False, True)} and everything[0]["root"]
    assert all(equal(*pair) for pair in zip(base, plain, strict=True))
    if not use_orig_params:
        # With original parameters torch 2.13 adds the gradients of the step before to the new ones where units compute
        # on the CPU, which `load_model` refuses. On a GPU it does not: benchmarks/optimizers_check.py.
        assert all(equal(*pair) for pair in zip(everything, plain, strict=True))


def equal(result: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Losses, rows and adapters, bit by bit."""
    assert result["adapter"].keys() == expected["adapter"].keys() and result["rows"] == expected["rows"] > 0
    same = all(torch.equal(result["adapter"][key], value) for key, value in expected["adapter"].items())
    return same and result["losses"] == expected["losses"]


def survive(path: str, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Every format's weights after a step with everything offloaded, rows stored as bf16."""
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    torch.cpu.Stream.synchronize = lambda _: None  # type: ignore[attr-defined]
    found, device = {}, torch.device("cpu")
    for name in names:
        model: Any = load_model(path, quantization_config=CASES[name].make_config(), peft_config=LORA)
        layers = decoder_layers(model.get_base_model())
        arguments = fsdp1.unit_arguments(
            model, layers, precision=resolve_precision(None), offload="all", device=device
        )  # fmt: skip
        root = fsdp1.wrap(model, arguments)
        root.train()
        root(**batch()).loss.backward()
        assert check_integrity(root) > 0
        named = [(plain_name(fsdp1.clean_name(n)), m) for n, m in model.named_modules()]
        found[name] = {key: layer.dequantize() for key, layer in named if isinstance(layer, QuantizedLinear)}
    return found


def test_every_format_survives_offload(tmp_path: Path) -> None:
    path, names = str(save_tiny_model(tmp_path, "llama")), names_to_run()
    [expected] = run_distributed(weights_of, path, names, world_size=1, process_group=False, env=CPU)
    for found in run_distributed(survive, path, names, env=FSDP1):
        for name in names:
            assert found[name].keys() == expected[name].keys()
            assert all(torch.equal(found[name][key], weight) for key, weight in expected[name].items()), name


def test_fsdp1_offload_is_refused_where_torch_cannot_pin() -> None:
    for offload in ("base", "all"):
        with pytest.raises(ConfigError, match=f"offload='{offload}' with FSDP1 needs an accelerator: torch pins"):
            check_offload(offload, "fsdp1", torch.device("cpu"))  # type: ignore[arg-type]
        check_offload(offload, "fsdp1", torch.device("cuda"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=re.escape("offload_pin_memory=False with FSDP1 cannot be honoured")):
        check_offload("base", "fsdp1", torch.device("cuda"), pin_memory=False)
