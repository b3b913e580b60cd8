"""What a rank's device holds of the model: active parameters whole, parked linear layers as rows, the rest in 16 bit.

An active parameter is replicated: every rank has all of it, in the model's dtype, for forward and backward. Its
master is divided: each rank has its slice on the device and updates it there (`ActiveSlice`), and what was updated is
gathered into the parameter. Where model and masters have one dtype the slice *is* the parameter's memory.

Activation: master slice from the host, cast, gathered. Parking: master slice back to the host; a linear layer gets
rows made from the parameter, which is the master cast to the model's dtype as `load_model` casts it, and lets go of
its weight. Rows are never made from rows, so quantisation error does not add up.

Engines differ in who owns the rows. Without FSDP2 they are released while a layer is active; under FSDP2 the shard
stays allocated, because FSDP2 gathers from it, and each rank rewrites its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_fsdp_qlora.distributed import rank, world_size
from hf_fsdp_qlora.integrity import fingerprint
from hf_fsdp_qlora.linear import QuantizedLinear, as_bytes
from hf_fsdp_qlora.rotary.masters import SLICE_UNIT, Masters, stochastic_round
from hf_fsdp_qlora.rotary.prefetch import Prefetch
from hf_fsdp_qlora.sharding import local_range, local_tensor, shard_again

CHANGE_ELEMENTS = 2**24
"""Weights that are compared at once with what they were: bounds the temporary memory to 192 MiB."""


@dataclass(eq=False)
class RotaryParameter:
    """One parameter that takes its turn.

    Args:
        name: the checkpoint's, as the model names it; the name of its master.
        parameter: what the optimizer and autograd see; of a quantised layer, its `dense`.
        shape: of the whole parameter.
        layer: whose rows stand for it while it is parked, or None where the parameter itself stays.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    layer: QuantizedLinear | None = None


class ActiveSlice:
    """This rank's slice of an active parameter: the master's values on the device, and how a step changes them.

    Three cases, decided by the dtypes:

    - equal to the parameter's and float32: the slice is a view of the parameter, and a step is the inner optimizer's;
    - float32 under a 16-bit parameter: values of its own, cast into the parameter after a step;
    - bfloat16, equal to the parameter's: a view; a step is made in float32 and rounded stochastically into it.

    Args:
        owner: the parameter.
        buffer: the parameter's memory, with equal room for every rank's slice.
        values: (n,) in the masters' dtype: a view of the buffer, or memory of its own.
        bounds: of the slice in the buffer.
    """

    def __init__(self, owner: RotaryParameter, buffer: Tensor, values: Tensor, bounds: tuple[int, int]) -> None:
        self.owner = owner
        self.buffer = buffer
        self.weights = buffer[bounds[0] : bounds[1]]
        self.values = values
        self.bounds = bounds

    @property
    def is_view(self) -> bool:
        """Whether a step of the inner optimizer on `values` is all there is to do."""
        return self.values.dtype == torch.float32 and self.values.data_ptr() == self.weights.data_ptr()

    def gradient(self) -> Tensor | None:
        """(n,) the slice of the parameter's gradient, or None if it got none."""
        whole = self.owner.parameter.grad
        return None if whole is None else whole.view(-1)[self.bounds[0] : self.bounds[1]]

    def write(self, stepped: Tensor, start: int, generator: torch.Generator) -> None:
        """Take over what a step made of a run of the values.

        Args:
            stepped: float32, new values from `start` on.
            generator: of the stochastic rounding.
        """
        values = self.values[start : start + stepped.numel()]
        if self.values.dtype == torch.bfloat16:  # float32 values were stepped in place
            values.copy_(stochastic_round(stepped, generator))
        if self.values.data_ptr() != self.weights.data_ptr():
            self.weights[start : start + stepped.numel()].copy_(values)


class ActiveSet:
    """The parameters of a model that can be active, and those that are.

    Args:
        model: theirs.
        parameters: all of them.
        masters: of the same names.
        device: where the model computes.
        largest_visit: weights that may become active at once, of those that are prefetched.

    Attributes:
        slices: of the active parameters, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[RotaryParameter],
        masters: Masters,
        *,
        device: torch.device,
        largest_visit: int,
    ) -> None:
        self.model = model
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self.masters = masters
        self.device = device
        self.slices: dict[str, ActiveSlice] = {}
        # A slice may exceed its share by less than two units.
        room = largest_visit // masters.world_size + 2 * SLICE_UNIT * len(parameters)
        self._prefetch = Prefetch(masters, device, room=room)
        self._touched: set[str] = set()

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to bring masters of parameters that will be active next; see prefetch.py."""
        self._prefetch.start([name for name in names if name not in self.slices])

    def activate(self, names: Iterable[str]) -> None:
        """Bring parameters to the device and let them be trained. Collective, in the order of the names."""
        with torch.no_grad():
            for name in names:
                self.slices[name] = self._activate(self.parameters[name])
        self._prefetch.clear()

    def park(self, names: Iterable[str]) -> dict[str, float]:
        """Put the masters of active parameters back on the host and stop training them. No communication.

        Returns:
            For each name, the squared L2 norm of what the visit changed in this rank's slice.
        """
        changes = {}
        shard_again(self.model)  # rows that stayed gathered would be read on instead of new ones
        with torch.no_grad():
            for name in names:
                active = self.slices.pop(name)
                changes[name] = self._change(active)
                self.masters.drop_start(name)
                self.masters.store(name, active.values)
                self._park(active.owner)
        return changes

    def set_trainable(self, trainable: bool) -> None:
        """Mark every parameter while all are parked: the trainer builds its optimizer from those that are trainable,
        and backward goes as far down as there are any."""
        assert not self.slices
        for owner in self.parameters.values():
            owner.parameter.requires_grad_(trainable)

    def flush(self) -> None:
        """Write the masters of the active parameters to the host and go on training them."""
        for name, active in self.slices.items():
            self.masters.put_aside(name)
            self.masters.store(name, active.values)

    def refresh(self) -> None:
        """Make rows and parameters again from masters that were replaced. Collective; nothing may be active."""
        assert not self.slices, "masters can be replaced only while everything is parked"
        self._prefetch.clear()  # staged from the masters before
        shard_again(self.model)
        with torch.no_grad():
            for name, owner in self.parameters.items():
                if name in self._touched or self.masters.is_trained(name):
                    trainable = owner.parameter.requires_grad
                    self._activate(owner)
                    self._park(owner)
                    owner.parameter.requires_grad_(trainable)

    def gather(self) -> None:
        """Bring every rank's slices into the active parameters, after a step. Collective."""
        if world_size() > 1:
            with torch.no_grad():
                for active in self.slices.values():
                    _gather(active.buffer)

    def device_bytes(self) -> int:
        """What this rank's device holds of the model: rows, parameters, gradients and master slices."""
        seen: dict[int, int] = {}
        for owner in self.parameters.values():
            held: list[Tensor | None] = [owner.parameter, owner.parameter.grad]
            if owner.layer is not None:
                held += [owner.layer.weight, owner.layer.weight_stats]
            if owner.name in self.slices:
                held.append(self.slices[owner.name].values)
            for tensor in held:
                local = None if tensor is None else local_tensor(tensor)
                if local is not None and local.numel():
                    seen[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
        return sum(seen.values())

    def _activate(self, owner: RotaryParameter) -> ActiveSlice:
        parameter = owner.parameter
        self._touched.add(owner.name)
        # What stood for it goes first: its master has everything, and an embedding is large.
        parameter.data = parameter.data.new_empty(0)
        if owner.layer is not None:
            _release_rows(owner.layer)
        bounds = self.masters.slice_bounds(owner.name)
        flat = torch.empty(self.masters.padded_numel(owner.name), dtype=parameter.dtype, device=self.device)
        weights = flat[bounds[0] : bounds[1]]
        values = weights
        if self.masters.dtype != parameter.dtype:
            values = torch.empty(weights.shape, dtype=self.masters.dtype, device=self.device)
        self._prefetch.load(owner.name, values)
        if values is not weights:
            weights.copy_(values)
        _gather(flat)
        parameter.data = flat[: owner.shape.numel()].view(owner.shape)
        parameter.requires_grad_(True)
        return ActiveSlice(owner, flat, values, bounds)

    def _park(self, owner: RotaryParameter) -> None:
        owner.parameter.grad = None
        owner.parameter.requires_grad_(False)
        if owner.layer is not None:
            _make_rows(owner.layer, owner.parameter.data)
            owner.parameter.data = torch.empty(0, dtype=owner.parameter.dtype, device=self.device)

    def _change(self, active: ActiveSlice) -> float:
        name = active.owner.name
        before = self.masters.start(name)
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for old, new in zip(before.split(CHANGE_ELEMENTS), active.values.split(CHANGE_ELEMENTS), strict=True):
            squares += (
                (new.float() - old.to(self.device, self.masters.dtype).float()).square().sum(dtype=torch.float64)
            )
        return squares.item()


def _gather(flat: Tensor) -> None:
    """Fill every rank's slice of a buffer from the rank that owns it."""
    if world_size() > 1:
        chunk = flat.numel() // world_size()
        dist.all_gather_into_tensor(flat, flat[rank() * chunk : (rank() + 1) * chunk].clone())


def _release_rows(layer: QuantizedLinear) -> None:
    """Free the rows of a layer that computes with its weight. Under FSDP2 they stay, unread."""
    layer.row_fingerprints = None  # nothing to compare with until they are made again
    for rows in (layer.weight, layer.weight_stats):
        if not isinstance(rows, DTensor):
            rows.data = rows.data.new_empty(0, rows.shape[1])


def _make_rows(layer: QuantizedLinear, weight: Tensor) -> None:
    """Quantise a whole weight, which every rank has, and keep this rank's rows.

    Args:
        weight: (out_features, in_features) in the layer's dtype.
    """
    made = layer.backend.quantize(weight.reshape(-1).to(layer.dtype), weight.numel(), lambda rows: rows)
    layer.row_fingerprints = fingerprint(*made)
    for parameter, rows in zip((layer.weight, layer.weight_stats), made, strict=True):
        if isinstance(parameter, DTensor):
            first, last = local_range(parameter)
            as_bytes(local_tensor(parameter)).copy_(rows[first:last])
        else:
            parameter.data = rows.contiguous().view(parameter.dtype)
