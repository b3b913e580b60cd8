"""The loops that stand in for torch's walks over modules give what torch gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from hf_fsdp_qlora import load_model
from hf_fsdp_qlora.trainer_compat.walks import set_quick_walks
from tests.lora_models import bnb_config
from tests.tiny_models import save_tiny_model


class Stubborn(nn.Module):
    """In eval mode whatever it is told, as a frozen normalisation may be; its children do not hear of it."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Dropout()

    def train(self, mode: bool = True) -> Stubborn:
        self.asked = mode
        self.training = False
        return self


def model() -> Any:
    """Layers with a module and a parameter in two places, an empty place, and a child with its own `train`."""
    shared = nn.Linear(2, 2)
    layers: Any = nn.ModuleList(
        [nn.Sequential(shared, Stubborn(), nn.LayerNorm(2)), nn.Sequential(nn.Linear(2, 2), shared)]
    )
    layers[1][0].weight = layers[0][2].weight
    layers[1].register_module("none", None)
    layers.register_parameter("own", nn.Parameter(torch.zeros(1)))
    root = nn.Module()
    root.layers, root.head, root.late = layers, nn.Linear(2, 2, bias=False), nn.ParameterDict({"a": torch.zeros(1)})
    return root


def test_parameters_in_the_order_of_torch_and_once() -> None:
    ours = model()
    of_torch = [*ours.parameters()]
    set_quick_walks(ours)
    assert len(of_torch) == 8 and all(a is b for a, b in zip(ours.parameters(), of_torch, strict=True))
    assert [*ours.parameters(recurse=False)] == []
    ours.register_parameter("own", nn.Parameter(torch.zeros(1)))
    assert [*ours.parameters(recurse=False)] == [ours.own]
    ours.layers[1].append(nn.Linear(1, 1))  # as an adapter that comes later
    assert len([*ours.parameters()]) == 11
    sum(parameter.sum() for parameter in ours.parameters()).backward()
    ours.zero_grad()
    assert all(parameter.grad is None for parameter in of_torch)


def test_train_and_eval_reach_what_they_reach_in_torch() -> None:
    ours, stock = model(), model()
    set_quick_walks(ours)
    for step in ("eval", "train", "eval"):
        for one in (ours, stock):
            one.layers[0][2].train(step == "eval")  # not as its parent
            getattr(one, step)()
        modes = [[module.training for module in one.modules()] for one in (ours, stock)]
        assert modes[0] == modes[1] and ours.layers[0][1].asked == (step == "train")
    told: list[bool] = []
    ours.layers[1][0].train = told.append  # on the instance, as a list of layers inside another has it
    ours.train()
    assert told == [True] and not ours.layers[1][0].training and ours.layers[1].training
    del ours.layers[1][0].train
    ours.eval()
    with pytest.raises(ValueError, match="boolean"):
        ours.layers.train("yes")
    copied = copy.deepcopy(ours)
    copied.train()
    assert copied.layers[1][0].training and not ours.layers[1][0].training
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in ours.parameters()}


def test_a_loaded_model_walks_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    loaded: Any = load_model(
        tmp_path, quantization_config=bnb_config(), peft_config=LoraConfig(target_modules="all-linear"),
        dtype=torch.bfloat16,
    )  # fmt: skip
    of_torch = [*nn.Module.parameters(loaded)]
    assert all(a is b for a, b in zip(loaded.parameters(), of_torch, strict=True))
    monkeypatch.setattr(nn.Module, "named_modules", None)
    assert sum(parameter.requires_grad for parameter in loaded.parameters()) == 28
    loaded.eval()
    asked: list[nn.Module] = []
    stock = nn.Module.train

    def train(module: nn.Module, mode: bool = True) -> nn.Module:
        asked.append(module)
        return stock(module, mode)

    monkeypatch.setattr(nn.Module, "train", train)
    loaded.train()
    assert len(asked) < 10 and loaded.get_base_model().model.layers[1].self_attn.q_proj.training
