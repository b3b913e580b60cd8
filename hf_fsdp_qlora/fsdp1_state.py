"""Reading and writing what FSDP1 split: parameters and optimizer states, whole and by the names of the bare model.

Adapters are gathered unit by unit, so that no frozen unit takes part. Every function but `parameter_shapes` is
collective: call it on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from hf_fsdp_qlora.distributed import rank, world_size
from hf_fsdp_qlora.fsdp1 import clean_name, held, is_wrapped, root_of, whole
from hf_fsdp_qlora.sharding import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from hf_fsdp_qlora.sharding import FullyShardedDataParallel as FSDP


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the whole parameters by the names that they have without FSDP1. No communication."""
    root = root_of(model)
    return {
        name: shape
        for unit in FSDP.fsdp_modules(root)
        for name, shape in zip(_names(model, unit), _shapes(unit), strict=True)
    }


def read_parameters(model: nn.Module, wanted: set[str]) -> dict[str, Tensor]:
    """Whole parameters on the CPU of rank 0, by their names without FSDP1; empty on other ranks. Collective.

    Only units that hold a wanted parameter are gathered.
    """
    found: dict[str, Tensor] = {}
    for here in _units_with(model, wanted):
        if rank() == 0:
            found |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in here.items()}
    return found


def write_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, equal on every rank, into parameters by their names without FSDP1. Collective."""
    for here in _units_with(model, set(values), writeback=True):
        for name, tensor in here.items():
            tensor.detach().copy_(values[name])


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The whole optimizer state on the CPU of rank 0, keyed by parameter name; no states on other ranks. Collective.

    One kind of state at a time: torch gathers all kinds of a unit into one buffer, and on the CPU every kind then ends
    up with the values of the last (torch 2.13, `_allgather_orig_param_states`, with use_orig_params).
    """
    root = root_of(model)
    local = optimizer.state_dict()
    kinds: list[set[str]] = [set()] * world_size()
    dist.all_gather_object(kinds, {kind for values in local["state"].values() for kind in values})
    gathered: dict[str, Any] = {"state": {}}
    with _full_states(root, rank0_only=True):
        for kind in sorted(set().union(*kinds)) or [""]:
            of_kind = {key: {kind: values[kind]} for key, values in local["state"].items() if kind in values}
            part = FSDP.optim_state_dict(root, optimizer, {**local, "state": of_kind})
            gathered["param_groups"] = part.get("param_groups", [])
            for name, values in part.get("state", {}).items():
                gathered["state"].setdefault(name, {}).update(_copied(values))
    return gathered


def load_optimizer_state(model: nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    """Load what `optimizer_state` gives, the same on every rank, with the groups of `optimizer_names`. Collective."""
    root = root_of(model)
    with _full_states(root, rank0_only=False):
        loaded = FSDP.optim_state_dict_to_load(root, optimizer, saved)
    # Parameters of a unit share one step counter then, and each would count every step.
    optimizer.load_state_dict({**loaded, "state": {key: _copied(values) for key, values in loaded["state"].items()}})


def optimizer_names(model: nn.Module, optimizer: Any) -> list[list[str]]:
    """Names of the parameters in each group of the optimizer. Collective."""
    root = root_of(model)
    with _full_states(root, rank0_only=False):
        empty = {**optimizer.state_dict(), "state": {}}
        return [group["params"] for group in FSDP.optim_state_dict(root, optimizer, empty)["param_groups"]]


@contextmanager
def plain_names(model: nn.Module) -> Iterator[None]:
    """Let PEFT pick an adapter's entries out of a state dict.

    It looks modules up by name, and asks saved modules for their own state dicts to learn their keys, which would
    gather them.
    """

    def entries_of(adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        prefix = f"modules_to_save.{adapter_name}."
        return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}

    def named_modules(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        for name, module in type(model).named_modules(model, *args, **kwargs):
            yield clean_name(name), module

    if not is_wrapped(model):
        yield
        return
    saved: list[Any] = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    model.named_modules = named_modules  # type: ignore[method-assign]
    for module in saved:
        module.adapter_state_dict = entries_of
    try:
        yield
    finally:
        del model.named_modules
        for module in saved:
            del module.adapter_state_dict


def _full_states(root: FSDP, *, rank0_only: bool) -> AbstractContextManager[Any]:
    config = FullOptimStateDictConfig(offload_to_cpu=True, rank0_only=rank0_only)
    return FSDP.state_dict_type(root, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), config)


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def _shapes(unit: FSDP) -> Sequence[torch.Size]:
    return () if unit._handle is None else unit._handle.flat_param._shapes


def _names(model: nn.Module, unit: FSDP) -> list[str]:
    """Names in the wrapped model of the parameters in a unit."""
    inner = model.module if isinstance(model, FSDP) else model
    of_module = {id(module): clean_name(name) for name, module in inner.named_modules()}
    return [f"{of_module[id(module)]}.{name}" for module, name in held(unit)]


def _units_with(model: nn.Module, wanted: set[str], *, writeback: bool = False) -> Iterator[dict[str, Tensor]]:
    """The wanted parameters while they are whole, unit by unit."""
    root = root_of(model)
    inner = root.module
    of_module = {id(module): clean_name(name) for name, module in inner.named_modules()}
    for unit in FSDP.fsdp_modules(root):
        places = {f"{of_module[id(module)]}.{name}": (module, name) for module, name in held(unit)}
        if wanted & places.keys():
            with whole(root, unit, writeback=writeback):
                yield {key: getattr(*place) for key, place in places.items() if key in wanted}
