"""What FSDP2 shards, in which groups and under which policies.

This is the one module that imports `torch.distributed.fsdp`; what FSDP1 does with it is in fsdp1.py.

Per decoder layer there are two groups. The quantised rows form one *without* a mixed-precision policy: a policy would
cast the bytes as if they were numbers. Everything else of the layer (adapters, norms, biases) forms the other, under
the policy, so that fp32 adapters compute in bf16 and their gradients are reduced in fp32. Rows are float32 views on
every torch version: FSDP2 copies a group of one dtype with `torch._foreach_copy_`, which rewrites NaN bit patterns of
bf16 and fp16 on CUDA (https://github.com/pytorch/pytorch/issues/159333) and leaves those of float32 alone.

Final norm, tied embedding and head are one group that stays gathered: TRL's fused head reads `lm_head.weight` outside
the head's forward, when a group of its own would be sharded.

With several replicas (HSDP) all of this holds inside each: rows are split over the ranks of one replica and equal in
all of them.

Left out: tensor and pipeline parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (  # noqa: F401  (some names are for fsdp1.py: this module alone imports them)
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    StateDictType,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._runtime_utils import _lazy_init as fsdp1_lazy_init  # noqa: F401
from torch.distributed.fsdp.wrap import CustomPolicy  # noqa: F401
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hf_fsdp_qlora.distributed import rank, world_size
from hf_fsdp_qlora.engine import Offload
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.outside import outside_layers


def apply_fsdp2(
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    reduce_dtype: torch.dtype = torch.float32,
    offload: Offload = "none",
    pin_memory: bool = True,
    reshard_after_forward: bool = True,
    whole: Collection[nn.Parameter] = (),
) -> None:
    """Shard a model that is still on the meta device, in place.

    Args:
        model: the root; with adapters, the PeftModel (accelerate would shard anything else again).
        layers: the decoder layers.
        mesh: of `make_mesh`: over all ranks, or (replicas, ranks of one).
        dtype: compute dtype; float32 means no mixed precision.
        reduce_dtype: in which gradients are summed over the ranks.
        offload: what lives in host memory.
        pin_memory: pin it, where there is an accelerator.
        reshard_after_forward: free gathered layers after forward and gather them again for backward.
        whole: frozen parameters that every rank keeps whole (outside.py): all of the embedding's, or of the tail's.
    """
    mixed = MixedPrecisionPolicy()
    if dtype != torch.float32:
        # Inputs are in `dtype` already; casting them too would round float32 rotary embeddings (OLMo 2 passes them).
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    common: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mixed,
        "offload_policy": _policy(offload == "all", pin_memory),
        "shard_placement_fn": _placement_for(mesh.size(mesh.ndim - 1)),
    }
    for layer in layers:
        rows: list[nn.Module] = [module for module in layer.modules() if isinstance(module, QuantizedLinear)]
        if rows:
            fully_shard(
                rows,
                mesh=mesh,
                offload_policy=_policy(offload != "none", pin_memory),
                reshard_after_forward=reshard_after_forward,
            )
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **common)
    embedding, tail = outside_layers(model, layers)
    tail = [module for module in tail if not any(parameter in whole for parameter in module.parameters())]
    if tail:
        fully_shard(tail, reshard_after_forward=False, **common)
    if embedding is not None and not any(parameter in whole for parameter in embedding.parameters()):
        unit = fully_shard(embedding, **common)
        if not any(parameter.requires_grad for parameter in embedding.parameters()):
            unit.set_unshard_in_backward(False)  # nothing is computed there; it would be gathered beside layer 0
    fully_shard(model, ignored_params={*whole}, **common)


def apply_fsdp2_to_rows(
    model: nn.Module, layers: Sequence[nn.Module], *, mesh: DeviceMesh, reshard_after_forward: bool = True
) -> None:
    """Shard quantised rows and nothing else, for a trainer that replicates all other parameters and reduces their
    gradients itself. Arguments as in `apply_fsdp2`; rows have no dtype to compute in and are never offloaded.
    """
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    rows = {id(parameter) for layer in quantized for parameter in (layer.weight, layer.weight_stats)}
    others = {parameter for parameter in model.parameters() if id(parameter) not in rows}
    for layer in layers:
        group: list[nn.Module] = [module for module in layer.modules() if isinstance(module, QuantizedLinear)]
        if group:
            fully_shard(group, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=others)
    fully_shard(model, mesh=mesh, ignored_params=others)


def shard_again(model: nn.Module) -> None:
    """Free whatever FSDP2 has gathered, so that the shards are all there is and can be rewritten."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def end_forward(modules: Iterable[nn.Module]) -> None:
    """Bring groups to rest whose forward never completed, because some module of theirs was not called.

    Such a group would stay gathered through `shard_again`, and torch 2.11 would not gather it for the next forward.
    Harmless for groups at rest. Not for use between forward and backward.

    Args:
        modules: that FSDP2 shards.
    """
    for module in modules:
        state = module._get_fsdp_state()  # type: ignore[operator]
        state._modules_to_run_forward.clear()
        if state._fsdp_param_group is not None:
            state._fsdp_param_group._training_state = TrainingState.IDLE


def make_mesh(device_type: str, replicas: int) -> DeviceMesh:
    """The ranks as FSDP2 sees them: one dimension that shards, or one that replicates and one that shards (HSDP).

    Ranks are numbered node by node, so with as many replicas as nodes a replica is a node.

    Args:
        replicas: copies of the model; divides the number of ranks.
    """
    if replicas == 1:
        return init_device_mesh(device_type, (world_size(),), mesh_dim_names=("fsdp",))
    shape = (replicas, world_size() // replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


@dataclass(frozen=True)
class RowRanks:
    """The ranks that together make one copy of a tensor's rows.

    Attributes:
        index: this rank's place among them.
        size: how many they are.
        group: their process group; None is the group of all ranks.
    """

    index: int
    size: int
    group: ProcessGroup | None


def row_ranks(parameter: Tensor) -> RowRanks:
    """Who shares the work on a parameter's rows: the ranks it is split over, or all ranks if it is not split."""
    if not isinstance(parameter, DTensor):
        return RowRanks(rank(), world_size(), None)
    mesh, (dim,) = parameter.device_mesh, [i for i, place in enumerate(parameter.placements) if place.is_shard()]
    return RowRanks(mesh.get_local_rank(dim), mesh.size(dim), mesh.get_group(dim))


def replica_group(parameter: Tensor) -> ProcessGroup | None:
    """The ranks that hold the same part of a parameter in different replicas, or None if there is one replica."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim == 1:
        return None
    return parameter.device_mesh.get_group("dp_replicate")


def local_range(parameter: Tensor) -> tuple[int, int]:
    """First and past-the-last index of dim 0 that this rank holds; all of it when the parameter is not sharded."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if shape[1:] != parameter.shape[1:]:
        raise ValueError(f"the parameter is sharded over {parameter.placements}, not over dim 0")
    return offset[0], offset[0] + shape[0]


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, sharing its memory."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def write_full_tensor(parameter: Tensor, full: Tensor) -> None:
    """Copy a full tensor into a parameter, each rank its own part. No communication.

    Args:
        parameter: a DTensor or a plain parameter, on any device.
        full: the same shape, on any device; equal on every rank.
    """
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        full = full[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    local_tensor(parameter).copy_(full)


Walk = Callable[[nn.Module], Iterator[list[QuantizedLinear]]]


def add_walk(applies: Callable[[nn.Module], bool], walk: Walk) -> None:
    """Teach `gathered_rows` how another engine gathers.

    Args:
        applies: whether this engine shards the model.
        walk: what `gathered_rows` does for such a model.
    """
    _WALKS.append((applies, walk))


def gathered_rows(model: nn.Module) -> Iterator[list[QuantizedLinear]]:
    """Walk over the quantised layers while their rows are whole: group by group, gathered as training gathers them.

    Collective under FSDP. A group is sharded again when the walk goes on.
    """
    for applies, walk in _WALKS:
        if applies(model):
            yield from walk(model)
            return
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not isinstance(model, FSDPModule):  # before FSDP1 wraps, rank 0 alone has values
        if any(layer.fetch_rows for layer in layers):
            yield from ([layer] for layer in layers if not layer.weight.is_meta)
        else:
            yield layers
        return
    # Streams and groups are set up by the root's first forward; the walk may come before it.
    model._get_fsdp_state()._lazy_init()
    groups: dict[int, list[QuantizedLinear]] = {}
    for layer in layers:
        groups.setdefault(id(layer._get_fsdp_state()), []).append(layer)  # type: ignore[operator]
    for group in groups.values():
        first: Any = group[0]
        first.unshard()
        try:
            yield group
        finally:  # also when the walk is left early
            first.reshard()


def allow_forward_method(model: nn.Module, name: str) -> None:
    """Let a method such as `generate` run on a sharded model before its first forward."""
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, name)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model."""
    return isinstance(model, FSDPModule)


_WALKS: list[tuple[Callable[[nn.Module], bool], Walk]] = []


def _policy(offload: bool, pin_memory: bool) -> OffloadPolicy:
    return CPUOffloadPolicy(pin_memory and torch.cuda.is_available()) if offload else OffloadPolicy()


def _placement_for(num_shards: int) -> Any:
    def placement(parameter: nn.Parameter) -> Shard | None:
        """Shard(1) for a trainable matrix with too few rows for every rank, such as LoRA A of a small rank.

        accelerate tells optimizer parameters apart by the address of their shard, and empty shards have none.
        """
        if not parameter.requires_grad or parameter.dim() != 2:
            return None
        rows, columns = parameter.shape
        some_rank_is_empty = -(-rows // num_shards) * (num_shards - 1) >= rows
        return Shard(1) if some_rank_is_empty and columns % num_shards == 0 else None

    return placement
