"""What goes over the wire: every collective of a stretch of code, with its bytes and the FSDP2 group that it serves.

All of torch's collectives pass the dispatcher as operators of two namespaces, whoever calls them (FSDP2, DTensor,
accelerate), in forward and in backward; a dispatch mode sees each of them once. FSDP2's all-gathers are told apart by
a wrapper around the communication object of each group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fsdp_qlora import QuantizedLinear

COLLECTIVES = ("c10d", "_c10d_functional")
NO_TRANSFER = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")


@dataclass(frozen=True)
class Transfer:
    """One collective.

    Attributes:
        op: the operator's name, such as "_allgather_base_".
        num_bytes: of the larger side: what an all-gather makes, what a reduce-scatter takes.
        group: the first module of the FSDP2 group that it gathers, or "".
    """

    op: str
    num_bytes: int
    group: str


class CollectiveLog(TorchDispatchMode):
    """While entered, notes every collective that this rank takes part in.

    Args:
        model: sharded by FSDP2, or not at all. Its all-gathers go by the name of their group from now on.

    Attributes:
        groups: for each FSDP2 group by name, the bytes that one all-gather makes, by kind (`kinds_of`).
        transfers: in the order in which they were issued.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.groups: dict[str, Counter[str]] = {}
        self.transfers: list[Transfer] = []
        self.serving = ""
        kinds = kinds_of(model)
        for name, module in model.named_modules():
            group: Any = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
            if group is None or isinstance(group._all_gather_comm, _NamedAllGather):  # modules that share a group
                continue
            group._all_gather_comm = _NamedAllGather(group._all_gather_comm, self, name)
            self.groups[name] = Counter()
            for fsdp_param in group.fsdp_params:
                parameter = fsdp_param.sharded_param
                itemsize = (fsdp_param.mp_policy.param_dtype or parameter.dtype).itemsize
                self.groups[name][kinds[id(parameter)]] += gathered_bytes(parameter, itemsize)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: the collectives inside its operators come back here
        op = func.__name__.partition(".")[0]
        if func.namespace in COLLECTIVES and op not in NO_TRANSFER:
            self.transfers.append(Transfer(op, max(map(_num_bytes, args)), self.serving))
        return func(*args, **(kwargs or {}))

    def gathered(self) -> Counter[str]:
        """Bytes that FSDP2 gathered, by kind. An all-gather of several kinds is split as its group is.

        Raises:
            RuntimeError: an all-gather was not of the size that its group has.
        """
        total: Counter[str] = Counter()
        for transfer in self.transfers:
            if not transfer.group:
                continue
            kinds = self.groups[transfer.group]
            if transfer.num_bytes != kinds.total():
                raise RuntimeError(f"{transfer.group} has {kinds}, but {transfer.num_bytes} bytes were gathered")
            total += kinds
        return total

    def times_gathered(self) -> Counter[str]:
        """All-gathers of each FSDP2 group, by its name."""
        return Counter(transfer.group for transfer in self.transfers if transfer.group)

    def others(self) -> dict[str, tuple[int, int]]:
        """How many there were of every other collective, and their bytes, by its name."""
        found: dict[str, tuple[int, int]] = {}
        for transfer in self.transfers:
            if not transfer.group:
                count, num_bytes = found.get(transfer.op, (0, 0))
                found[transfer.op] = count + 1, num_bytes + transfer.num_bytes
        return found


def kinds_of(model: nn.Module) -> dict[int, str]:
    """ "rows", "adapters" or "other" for the id of every parameter."""
    kinds = {id(parameter): "adapters" if parameter.requires_grad else "other" for parameter in model.parameters()}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            kinds |= {id(module.weight): "rows", id(module.weight_stats): "rows"}
    return kinds


def gathered_bytes(parameter: Tensor, itemsize: int) -> int:
    """What one all-gather of a parameter makes on each rank: its elements, padded to equal shards.

    Args:
        parameter: a DTensor with one sharded dimension; anything else is never gathered.
        itemsize: bytes of an element as it travels.
    """
    if not isinstance(parameter, DTensor):
        return 0
    [(mesh_dim, dim)] = [(i, place.dim) for i, place in enumerate(parameter.placements) if isinstance(place, Shard)]
    ranks = parameter.device_mesh.size(mesh_dim)
    padded = -(-parameter.shape[dim] // ranks) * ranks
    return padded * (parameter.numel() // parameter.shape[dim]) * itemsize


def expected_bytes(model: nn.Module, layers: Sequence[nn.Module], itemsize: int, *, passes: int = 2) -> Counter[str]:
    """What must be gathered for one forward and backward, by kind.

    Args:
        model: sharded by FSDP2, its rows float32 views.
        layers: the decoder layers, which are gathered once for forward and once more for backward; all that is
            outside them is gathered once.
        itemsize: bytes of an element in the compute dtype, in which everything but rows travels.
        passes: 1 if gathered layers stay until backward.
    """
    kinds = kinds_of(model)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    total: Counter[str] = Counter()
    for parameter in model.parameters():
        kind = kinds[id(parameter)]
        times = passes if id(parameter) in inside else 1
        total[kind] += times * gathered_bytes(parameter, parameter.dtype.itemsize if kind == "rows" else itemsize)
    return total


class _NamedAllGather:
    """FSDP2's own all-gather, which says whom it serves."""

    def __init__(self, comm: Any, log: CollectiveLog, name: str) -> None:
        self.comm, self.log, self.name = comm, log, name

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.comm.allocate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.log.serving = self.name
        try:
            return self.comm(*args, **kwargs)
        finally:
            self.log.serving = ""


def _num_bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_num_bytes, argument)) if isinstance(argument, list | tuple) else 0
