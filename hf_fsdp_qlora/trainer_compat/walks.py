"""What trainers ask of all modules at every step, in one loop each.

`train()`, `zero_grad()` and the clipping of gradients go through every module of a model. torch does so recursively,
with a generator per level and a name for each parameter: 9.5 ms of Python per step for 32 layers with LoRA, which are
2,665 modules, where these loops take 3.3 (benchmarks/step_walks.py). Left out: what accelerate wraps around a model
(DDP, FSDP1), whose own `parameters` are torch's. Can go when torch walks faster or the Trainer less often.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn


def set_quick_walks(model: nn.Module) -> None:
    """Replace `parameters`, which `zero_grad` and clipping use, of this model, and `train` of its lists of layers.

    What is around these lists may have a `train` of its own, as transformers' models have. `eval` is `train(False)`.
    """
    instance: Any = model
    instance.parameters = functools.partial(_parameters, model)
    for module in model.modules():
        if type(module) is nn.ModuleList:
            layers: Any = module
            layers.train = functools.partial(_train, module)


def _parameters(model: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
    """As `nn.Module.parameters`: each once, in the order of modules."""
    stack: list[nn.Module | None] = [model]
    seen: set[int] = set()
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
        if recurse:
            stack.extend(reversed(module._modules.values()))


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """As `nn.Module.train`; modules with a `train` of their own are asked."""
    if not isinstance(mode, bool):
        raise ValueError("training mode is expected to be boolean")
    model.training = mode
    stack = [*model._modules.values()]
    while stack:
        module = stack.pop()
        if module is None:
            continue
        if type(module).train is not nn.Module.train or "train" in vars(module):
            module.train(mode)
            continue
        if module.training != mode:  # setting an attribute of a module costs more than reading one
            module.training = mode
        stack.extend(module._modules.values())
    return model
