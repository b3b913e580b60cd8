"""FSDP1: what becomes a unit and under which policies, and how rows are found afterwards.

FSDP1 concatenates all parameters of a unit into one flat parameter and splits that. A flat parameter has one dtype, so
rows are stored in the dtype of the model, which is also the mixed-precision `param_dtype`: FSDP1 then casts nothing,
and it moves shards with `copy_` and `cat`, which keep every bit pattern (not with `_foreach_copy_`, see sharding.py).

Units are the decoder layers, and inside them one per module that is trained or has another dtype: adapters keep fp32
masters and compute in bf16, frozen parameters have no gradient, and both work with `use_orig_params` on and off.
Everything outside the decoder layers belongs to the root, which stays gathered from forward to backward.

Rank 0 brings all values and broadcasts them while units are made (`sync_module_states`); on the other ranks parameters
are on meta until then. `unit_arguments` says how to wrap, for accelerate or for `wrap`; `finish` comes after either.

Left out, and refused by `check_fsdp1`: what reads a parameter outside the forward of the module that owns it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn

from hf_fsdp_qlora.engine import Offload
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.linear import QuantizedLinear, as_bytes
from hf_fsdp_qlora.precision import Precision
from hf_fsdp_qlora.sharding import (
    CPUOffload,
    CustomPolicy,
    MixedPrecision,
    add_walk,
)
from hf_fsdp_qlora.sharding import FullyShardedDataParallel as FSDP
from hf_fsdp_qlora.sharding import fsdp1_lazy_init as _lazy_init

_ROOT = "hf_fsdp_qlora_fsdp1_root"
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def check_fsdp1(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Refuse what FSDP1 cannot train correctly. Before anything is loaded.

    Raises:
        ConfigError: naming the setting, the reason and the engine that can.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(
            "FSDP1 without an adapter would train the norms, the embeddings and the head. Pass peft_config or "
            "adapter_name_or_path, or use FSDP2 (fsdp_version: 2, accelerate_configs/fsdp2.yaml)."
        )
    base: Any = model.get_base_model()
    head: Any = base.get_output_embeddings()
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        own = list(module.named_parameters(recurse=False))
        if own and "lora_magnitude_vector" in name.split("."):
            _refuse("use_dora", name, "the norm of each row needs lora_A and lora_B outside their forward")
        if not any(parameter.requires_grad for _, parameter in own):
            continue
        if not all(parameter.requires_grad for _, parameter in own):
            _refuse("bias", name, "a flat parameter cannot hold trained and frozen tensors")
        if head is not None and any(part is module for part in head.modules()):
            _refuse("modules_to_save", name, "TRL's fused head reads the head's weight outside its forward")
        for key, parameter in own:
            if owners.setdefault(id(parameter), f"{name}.{key}") != f"{name}.{key}":
                _refuse("ensure_weight_tying", name, f"it shares its weight with {owners[id(parameter)]}")
    _own_units(model, layers)


def unit_arguments(
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    precision: Precision,
    offload: Offload,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `FullyShardedDataParallel` for a model that `load_model` returned.

    Args:
        model: not wrapped yet; on ranks other than 0 its parameters are on meta. On the CPU, where torch cannot
            broadcast while it wraps, values are broadcast here: collective then.
        layers: the decoder layers.
        device: where units compute.
    """
    on_cpu = device.type == "cpu"
    init = _ParameterInit(device)
    if on_cpu:
        _broadcast(model, init)
    offloaded = CPUOffload(offload_params=offload != "none")
    own = {id(module) for module in _own_units(model, layers)}
    wrapped = {id(layer) for layer in layers}

    def how(module: nn.Module) -> bool | dict[str, Any]:
        if id(module) in own:
            rows = {"cpu_offload": offloaded} if isinstance(module, QuantizedLinear) else {}
            return {"mixed_precision": _mixed(precision, cast_forward_inputs=True), **rows}
        # Rotary embeddings are inputs of a layer, and some models pass them in float32.
        return {"cpu_offload": offloaded, "mixed_precision": _mixed(precision)} if id(module) in wrapped else False

    return {
        "auto_wrap_policy": CustomPolicy(how),
        "mixed_precision": _mixed(precision),
        "sync_module_states": not on_cpu,
        "cpu_offload": CPUOffload(offload_params=offload == "all"),
        "param_init_fn": init,
        "device_id": device,
    }


def wrap(model: nn.Module, arguments: dict[str, Any], *, use_orig_params: bool = False) -> nn.Module:
    """Wrap as accelerate would, without accelerate. Collective.

    Args:
        arguments: of `unit_arguments`.

    Returns:
        The root, which takes the model's place.
    """
    root = FSDP(model, use_orig_params=use_orig_params, **arguments)
    finish(root)
    return root


def finish(root: nn.Module) -> None:
    """Let the quantised layers and the model find their units. Call it once, after wrapping and before training."""
    assert isinstance(root, FSDP)
    setattr(root.module, _ROOT, weakref.ref(root))
    for unit in FSDP.fsdp_modules(root):
        for module, name in held(unit):
            if isinstance(module, QuantizedLinear) and name == "weight":
                refs = weakref.ref(root), weakref.ref(unit), weakref.ref(module)
                module.fetch_rows = partial(_rows_in_unit, *refs)


def share_rows(model: nn.Module, device: torch.device) -> None:
    """Let `dequantize()` get rows from rank 0 until the model is wrapped.

    Args:
        device: where they are broadcast and dequantised.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.fetch_rows = partial(_rows_of_rank0, weakref.ref(module), device)


def is_wrapped(module: Any) -> bool:
    """Whether the module is a unit of FSDP1, or the model in its root unit."""
    return isinstance(module, FSDP) or hasattr(module, _ROOT)


def gathered_units(model: nn.Module) -> Iterator[list[QuantizedLinear]]:
    """Walk over the quantised layers of a wrapped model while their rows are whole, unit by unit. Collective."""
    root = root_of(model)
    for unit in FSDP.fsdp_modules(root):
        layers = [module for module, name in held(unit) if isinstance(module, QuantizedLinear) and name == "weight"]
        if layers:
            with whole(root, unit):
                yield layers


@contextmanager
def whole_root(model: nn.Module) -> Iterator[None]:
    """Everything outside the decoder layers gathered, as a forward that does not begin at the root needs it."""
    root = root_of(model)
    with whole(root, root):
        yield


def clean_name(name: str) -> str:
    """The name that a module or parameter has without wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def root_of(model: nn.Module) -> FSDP:
    """The root unit of a wrapped model; the root itself is fine."""
    if isinstance(model, FSDP):
        return model
    root = getattr(model, _ROOT)()
    assert root is not None, "the root unit is gone"
    return root


def held(unit: FSDP) -> list[tuple[nn.Module, str]]:
    """(module, name) of the parameters in a unit's flat parameter."""
    if unit._handle is None:
        return []
    return [(info.module, info.param_name) for info in unit._handle.flat_param._param_infos]


def whole(root: FSDP, unit: FSDP, *, writeback: bool = False) -> AbstractContextManager[None]:
    """A unit's parameters whole; inside its own forward or backward they are already."""
    if unit._handle is None or unit._handle._training_state.name != "IDLE":
        return nullcontext()
    # A unit that is asked first would take itself for the root.
    _lazy_init(root, root)
    return FSDP.summon_full_params(unit, recurse=False, writeback=writeback)


class _ParameterInit:
    """Allocates the meta parameters of one module at a time; tied ones stay tied, buffers are left alone.

    It outlives the wrapping, in accelerate's plugin, so it must not hold what it made: FSDP1 frees that, unit by unit.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # By id of the old parameter, which is on meta and is kept, so that its id is not used again.
        self.made: dict[int, tuple[nn.Parameter, weakref.ref[nn.Parameter]]] = {}

    def __call__(self, module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, self._replacement(parameter))

    def _replacement(self, parameter: nn.Parameter) -> nn.Parameter:
        made = self.made.get(id(parameter))
        new = None if made is None else made[1]()
        if new is None:
            empty = torch.empty_like(parameter, device=self.device)
            new = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            self.made[id(parameter)] = (parameter, weakref.ref(new))
        return new


def _own_units(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that cannot share a flat parameter with the rest: trained, of another dtype, or such that rows after
    them would begin inside a float32 word (statistics are read as float32, which torch refuses then). The last only
    inside the layers: a head with an odd number of biases must stay in the root, where TRL's fused head finds it.

    None if all parameters are alike, as in a model without an adapter.
    """
    kinds = {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()}
    if len(kinds) == 1:
        return []
    frozen = [p for layer in layers for p in layer.parameters() if not p.requires_grad]
    common = {(module.weight.dtype, False) for module in model.modules() if isinstance(module, QuantizedLinear)}
    common = common or {(frozen[0].dtype, False)} if frozen else common
    inside = {id(module) for layer in layers for module in layer.modules()}
    units = []
    for module in model.modules():
        own = {(parameter.dtype, parameter.requires_grad) for parameter in module.parameters(recurse=False)}
        uneven = any(p.numel() * p.itemsize % torch.float32.itemsize for p in module.parameters(recurse=False))
        if own and (own != common or (uneven and id(module) in inside)):
            units.append(module)
    return units


def _mixed(precision: Precision, *, cast_forward_inputs: bool = False) -> MixedPrecision | None:
    if precision.param_dtype is None:
        return None
    return MixedPrecision(
        param_dtype=precision.param_dtype,
        reduce_dtype=precision.reduce_dtype,
        buffer_dtype=None,  # accelerate would round rotary frequencies to bf16
        cast_forward_inputs=cast_forward_inputs,
        cast_root_forward_inputs=False,
    )


def _broadcast(model: nn.Module, init: Callable[[nn.Module], None]) -> None:
    for module in model.modules():
        init(module)
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), src=0)


@contextmanager
def _rows_in_unit(
    root: weakref.ref[FSDP], unit: weakref.ref[FSDP], layer: weakref.ref[QuantizedLinear]
) -> Iterator[tuple[Tensor, Tensor]]:
    of_root, of_unit, module = root(), unit(), layer()
    assert of_root is not None and of_unit is not None and module is not None
    with whole(of_root, of_unit):
        yield module.weight.detach(), module.weight_stats.detach()


@contextmanager
def _rows_of_rank0(layer: weakref.ref[QuantizedLinear], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    module = layer()
    assert module is not None
    whole = []
    for rows in (module.weight, module.weight_stats):
        given = torch.empty_like(rows, device=device) if rows.is_meta else rows.detach().to(device)
        dist.broadcast(as_bytes(given), src=0)
        whole.append(given)
    yield whole[0], whole[1]


def _refuse(setting: str, name: str, reason: str) -> None:
    raise ConfigError(
        f"{setting} does not work under FSDP1: {clean_name(name)} would train wrongly, because {reason}. Use FSDP2 "
        "(fsdp_version: 2, accelerate_configs/fsdp2.yaml), or leave it out."
    )


add_walk(is_wrapped, gathered_units)
