"""Storage for a model that is on meta, where each part of it is to live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from hf_fsdp_qlora.host_memory import allocate_in_slabs
from hf_fsdp_qlora.linear import QuantizedLinear


def materialize(
    model: nn.Module,
    device: torch.device,
    *,
    rows_device: torch.device | None = None,
    buffers_device: torch.device | None = None,
    pin_memory: bool = False,
    whole: Mapping[nn.Parameter, torch.device] | None = None,
) -> None:
    """Allocate, uninitialised, whatever is on the meta device; buffers that are real already keep their values.

    Under FSDP2 these are the local shards. Tied parameters stay tied.

    Args:
        device: for parameters and buffers.
        rows_device: for quantised rows, if something is offloaded. Frozen shards on the host then share slabs.
        buffers_device: for buffers, if they live elsewhere.
        pin_memory: of these slabs.
        whole: parameters with a device of their own.
    """
    elsewhere = whole or {}
    buffers = {id(buffer) for buffer in model.buffers()}
    rows = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
        for parameter in (module.weight, module.weight_stats)
    }

    def target_of(tensor: Tensor) -> torch.device:
        if isinstance(tensor, nn.Parameter) and tensor in elsewhere:
            return elsewhere[tensor]
        if id(tensor) in rows:
            return rows_device or device
        return buffers_device or device if id(tensor) in buffers else device

    done: dict[int, Tensor] = {}
    if rows_device is not None:
        on_host = [p for p in model.parameters() if not p.requires_grad and target_of(p).type == "cpu"]
        done |= _host_shards(on_host, pin_memory)

    def allocate(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            target = target_of(tensor)
            done[id(tensor)] = torch.empty_like(tensor, device=target) if tensor.is_meta else tensor.to(target)
        return done[id(tensor)]

    keep_alive = [*model.parameters(), *model.buffers()]  # ids must not be reused while they are keys
    ties = _tied_names(model)
    model._apply(allocate)
    for (module, name), others in ties:
        if not isinstance(getattr(module, name), DTensor):  # FSDP2 ties shared parameters of a group again by itself
            for other, other_name in others:
                setattr(other, other_name, getattr(module, name))
    del keep_alive


def _host_shards(parameters: Sequence[Tensor], pin_memory: bool) -> dict[int, Tensor]:
    """Sharded parameters on the host, their shards in slabs, by the id of the parameter on meta that they replace.

    Parameters that do not divide evenly are left out: FSDP2 copies their shards, to pad them.
    """
    even = [parameter for parameter in parameters if isinstance(parameter, DTensor) and _is_even(parameter)]
    parts = allocate_in_slabs([parameter.to_local() for parameter in even], pin=pin_memory)
    # Not `DTensor.from_local`, which moves the shard to the mesh's device.
    return {id(meta): DTensor(part, meta._spec, requires_grad=False) for meta, part in zip(even, parts, strict=True)}


def _is_even(parameter: DTensor) -> bool:
    shards = [(place.dim, index) for index, place in enumerate(parameter.placements) if isinstance(place, Shard)]
    return all(parameter.shape[dim] % parameter.device_mesh.size(index) == 0 for dim, index in shards)


def _tied_names(model: nn.Module) -> list[tuple[tuple[nn.Module, str], list[tuple[nn.Module, str]]]]:
    """For every parameter with more than one name: its first (module, name), and the others."""
    names: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append((module, name))
    return [(places[0], places[1:]) for places in names.values() if len(places) > 1]
