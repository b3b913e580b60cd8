"""FSDP1: what becomes a unit and under which policies, and how whole tensors are read and written afterwards.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from hf_fsdp_qlora.distributed import rank, world_size
from hf_fsdp_qlora.engine import Offload
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.linear import QuantizedLinear, as_bytes
from hf_fsdp_qlora.precision import Precision
from hf_fsdp_qlora.sharding import (
    CPUOffload,
    CustomPolicy,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    MixedPrecision,
    StateDictType,
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
            return {"mixed_precision": _mixed(precision, cast_forward_inputs=True)}
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
        for module, name in _held(unit):
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
    root = _root(model)
    for unit in FSDP.fsdp_modules(root):
        layers = [module for module, name in _held(unit) if isinstance(module, QuantizedLinear) and name == "weight"]
        if layers:
            with _whole(root, unit):
                yield layers


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the whole parameters by the names that they have without FSDP1. No communication."""
    root = _root(model)
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
    root = _root(model)
    local = optimizer.state_dict()
    kinds: list[set[str]] = [set()] * world_size()
    dist.all_gather_object(kinds, {kind for values in local["state"].values() for kind in values})
    whole: dict[str, Any] = {"state": {}}
    with _full_states(root, rank0_only=True):
        for kind in sorted(set().union(*kinds)) or [""]:
            of_kind = {key: {kind: values[kind]} for key, values in local["state"].items() if kind in values}
            part = FSDP.optim_state_dict(root, optimizer, {**local, "state": of_kind})
            whole["param_groups"] = part.get("param_groups", [])
            for name, values in part.get("state", {}).items():
                whole["state"].setdefault(name, {}).update(_copied(values))
    return whole


def load_optimizer_state(model: nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    """Load what `optimizer_state` gives, the same on every rank, with the groups of `optimizer_names`. Collective."""
    root = _root(model)
    with _full_states(root, rank0_only=False):
        loaded = FSDP.optim_state_dict_to_load(root, optimizer, saved)
    # Parameters of a unit share one step counter then, and each would count every step.
    optimizer.load_state_dict({**loaded, "state": {key: _copied(values) for key, values in loaded["state"].items()}})


def optimizer_names(model: nn.Module, optimizer: Any) -> list[list[str]]:
    """Names of the parameters in each group of the optimizer. Collective."""
    root = _root(model)
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


@contextmanager
def whole_root(model: nn.Module) -> Iterator[None]:
    """Everything outside the decoder layers gathered, as a forward that does not begin at the root needs it."""
    root = _root(model)
    with _whole(root, root):
        yield


def clean_name(name: str) -> str:
    """The name that a module or parameter has without wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class _ParameterInit:
    """Allocates the meta parameters of one module at a time; tied ones stay tied, buffers are left alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by id of the old one, which is kept alive

    def __call__(self, module: nn.Module) -> nn.Module:
        """Returns the module, which accelerate goes on with where weights are tied."""
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if id(parameter) not in self.made:
                    empty = torch.empty_like(parameter, device=self.device)
                    new = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    self.made[id(parameter)] = (parameter, new)
                setattr(module, name, self.made[id(parameter)][1])
        return module


def _full_states(root: FSDP, *, rank0_only: bool) -> AbstractContextManager[Any]:
    config = FullOptimStateDictConfig(offload_to_cpu=True, rank0_only=rank0_only)
    return FSDP.state_dict_type(root, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), config)


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def _own_units(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that cannot share a flat parameter with the rest: trained ones, and ones of another dtype.

    None if all parameters are alike, as in a model without an adapter.
    """
    kinds = {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()}
    if len(kinds) == 1:
        return []
    frozen = [p for layer in layers for p in layer.parameters() if not p.requires_grad]
    common = {(module.weight.dtype, False) for module in model.modules() if isinstance(module, QuantizedLinear)}
    common = common or {(frozen[0].dtype, False)} if frozen else common
    units = []
    for module in model.modules():
        own = {(parameter.dtype, parameter.requires_grad) for parameter in module.parameters(recurse=False)}
        if own and own != common:
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


def _broadcast(model: nn.Module, init: Callable[[nn.Module], nn.Module]) -> None:
    for module in model.modules():
        init(module)
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), src=0)


def _root(model: nn.Module) -> FSDP:
    if isinstance(model, FSDP):
        return model
    root = getattr(model, _ROOT)()
    assert root is not None, "the root unit is gone"
    return root


def _held(unit: FSDP) -> list[tuple[nn.Module, str]]:
    """(module, name) of the parameters in a unit's flat parameter."""
    if unit._handle is None:
        return []
    return [(info.module, info.param_name) for info in unit._handle.flat_param._param_infos]


def _shapes(unit: FSDP) -> Sequence[torch.Size]:
    return () if unit._handle is None else unit._handle.flat_param._shapes


def _names(model: nn.Module, unit: FSDP) -> list[str]:
    """Names in the wrapped model of the parameters in a unit."""
    inner = model.module if isinstance(model, FSDP) else model
    of_module = {id(module): clean_name(name) for name, module in inner.named_modules()}
    return [f"{of_module[id(module)]}.{name}" for module, name in _held(unit)]


def _units_with(model: nn.Module, wanted: set[str], *, writeback: bool = False) -> Iterator[dict[str, Tensor]]:
    """The wanted parameters while they are whole, unit by unit."""
    root = _root(model)
    inner = root.module
    of_module = {id(module): clean_name(name) for name, module in inner.named_modules()}
    for unit in FSDP.fsdp_modules(root):
        places = {f"{of_module[id(module)]}.{name}": (module, name) for module, name in _held(unit)}
        if wanted & places.keys():
            with _whole(root, unit, writeback=writeback):
                yield {key: getattr(*place) for key, place in places.items() if key in wanted}


def _whole(root: FSDP, unit: FSDP, *, writeback: bool = False) -> AbstractContextManager[None]:
    """A unit's parameters whole; inside its own forward or backward they are already."""
    if unit._handle is None or unit._handle._training_state.name != "IDLE":
        return nullcontext()
    # A unit that is asked first would take itself for the root.
    _lazy_init(root, root)
    return FSDP.summon_full_params(unit, recurse=False, writeback=writeback)


@contextmanager
def _rows_in_unit(
    root: weakref.ref[FSDP], unit: weakref.ref[FSDP], layer: weakref.ref[QuantizedLinear]
) -> Iterator[tuple[Tensor, Tensor]]:
    of_root, of_unit, module = root(), unit(), layer()
    assert of_root is not None and of_unit is not None and module is not None
    with _whole(of_root, of_unit):
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
