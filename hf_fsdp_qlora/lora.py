"""LoRA over quantized layers, through PEFT: inject on meta, then fill once the parameters have storage.

The order `load_model` keeps: `check_peft_config` (lora_config.py) -> `add_adapter` on the meta model -> sharding ->
base weights streamed -> `initialize_adapters`, or `load_adapter_weights` for a saved adapter. Two phases, because
sharding must see the adapters, and nothing can be initialised before it has storage.

Initial values are exactly those of `torch.manual_seed(seed); get_peft_model(...)` on the unsharded CPU model: every
rank draws all of them, one layer at a time with PEFT's own layer class, and keeps its shard. They depend neither on
the number of ranks nor on the state of the global generator.

All trained parameters have one dtype (`adapter_dtype`), which FSDP2 requires inside a group; layers of the model that
are trained whole hold masters in it and still compute in the model's dtype.

Left out: merging in place (the base is rows of bytes; see `merge_adapter`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.lora_layer import DenseLoraLinear, QuantizedLoraLinear
from hf_fsdp_qlora.sharding import local_tensor, write_full_tensor

ADAPTER_NAME = "default"  # PEFT's own default; load_model makes one adapter
WEIGHTS_NAME = "adapter_model.safetensors"


def add_adapter(
    model: PreTrainedModel, peft_config: LoraConfig, *, adapter_dtype: torch.dtype = torch.float32
) -> PeftModel:
    """Inject an adapter into a model on meta, its parameters on meta too.

    Args:
        model: parameters on meta, quantized layers in place; changed in place and wrapped.
        peft_config: checked by `check_peft_config`; it is copied, not changed.
        adapter_dtype: of everything that is trained: LoRA weights, `modules_to_save` copies, trained biases.

    Returns:
        PEFT's model, with its config's `base_model_name_or_path` set to the model's.
    """
    config = copy.deepcopy(peft_config)
    config._register_custom_module({QuantizedLinear: QuantizedLoraLinear, nn.Linear: DenseLoraLinear})
    # Initialisers that build new tensors would take the dtype of the packed rows; values come later anyway.
    wanted, config.init_lora_weights = config.init_lora_weights, False
    with torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    config.init_lora_weights = wanted
    _tie_saved_modules(peft_model, config)
    _set_dtype(peft_model, adapter_dtype)
    if config.inference_mode:  # PEFT leaves trained biases trainable
        peft_model.requires_grad_(False)
    return peft_model


def initialize_adapters(model: PeftModel, seed: int) -> None:
    """Fill a new adapter: LoRA weights from the seed, `modules_to_save` copies from the modules they replace.

    Args:
        model: what `add_adapter` returned, sharded or not, with storage everywhere and the base weights loaded.
        seed: as in `torch.manual_seed(seed)` before stock PEFT; the global generator is left as it was.

    No communication: every rank computes full tensors, one layer at a time, and writes its part.
    """
    config = model.peft_config[ADAPTER_NAME]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _one_thread():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        for module in model.modules():
            if isinstance(module, LoraLayer):
                _fill_as_stock(module, config)
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                _copy_parameters(module.original_module, module.modules_to_save[ADAPTER_NAME])


def load_adapter_weights(model: PeftModel, adapter_name_or_path: str, **hub_kwargs: Any) -> None:
    """Fill the adapter from a saved one, one tensor at a time; every rank keeps its part.

    Args:
        model: what `add_adapter` returned for the saved adapter's config, sharded or not, with storage everywhere.
        adapter_name_or_path: hub id or local folder with `adapter_model.safetensors`.
        hub_kwargs: revision, token, cache_dir, subfolder.

    Raises:
        ConfigError: the file is missing, is not safetensors, or its tensors are not exactly the adapter's.
    """
    path = _weights_file(adapter_name_or_path, **hub_kwargs)
    names = _saved_names(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with safe_open(path, framework="pt") as weights, torch.no_grad():
        problems = _mismatches(weights, {key: parameters[name] for key, name in names.items()})
        if problems:
            raise ConfigError(
                f"the tensors in {path} are not those of this model with that adapter config: {'; '.join(problems)}. "
                "Load the base model that the adapter was trained on, with its embeddings of the same size."
            )
        for key, name in names.items():
            write_full_tensor(parameters[name], weights.get_tensor(key))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The QR of the orthogonal initialisation depends on the number of threads, and launchers set that by rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fill_as_stock(layer: Any, config: Any) -> None:
    """Give a LoRA layer the values that PEFT would draw now, by building the layer once more on CPU."""
    base = layer.get_base_layer()
    dtype = base.compute_dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
    stand_in = nn.Linear(layer.in_features, layer.out_features, bias=base.bias is not None, device="meta")
    # PEFT rounds new values to the dtype of the base layer, and reads that and the device from its weight.
    stand_in.weight = nn.Parameter(torch.empty(0, dtype=dtype))
    rank, alpha = layer.r[ADAPTER_NAME], layer.lora_alpha[ADAPTER_NAME]
    config = copy.copy(config)
    config.use_dora = False  # magnitudes need the weights: `initialize_magnitudes`
    drawn = LoraLinear(stand_in, ADAPTER_NAME, config=config, r=rank, lora_alpha=alpha)
    parameters = dict(layer.named_parameters())
    for name, value in drawn.named_parameters():
        if not name.startswith("base_layer."):
            write_full_tensor(parameters[name], value)


def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers between modules of one shape, each rank its own shard."""
    targets = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    sources = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, into in targets.items():
        value = sources[name]
        if not isinstance(value, DTensor):
            write_full_tensor(into, value)
            continue
        assert isinstance(into, DTensor) and into.placements == value.placements, f"{name} is sharded in two ways"
        local_tensor(into).copy_(local_tensor(value))


def _tie_saved_modules(model: PeftModel, config: LoraConfig) -> None:
    """Share the trained embedding with the modules tied to it, as `ensure_weight_tying` asks.

    PEFT does so, but its injection on meta makes every assigned parameter a new one.
    """
    tied = getattr(config, "modules_to_tie", None) or ()
    if tied:
        base: Any = model.get_base_model()
        trained = base.get_input_embeddings().modules_to_save[ADAPTER_NAME]
        for name in tied:
            base.get_submodule(name).modules_to_save[ADAPTER_NAME].weight = trained.weight


def _set_dtype(model: PeftModel, adapter_dtype: torch.dtype) -> None:
    """Give all adapter parameters one dtype, and let modules that are trained whole compute in their own."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    parts = [getattr(layer, part) for layer in layers for part in layer.adapter_layer_names]
    of_lora = {id(parameter) for part in parts for parameter in part.parameters()}
    own_dtypes: dict[nn.Module, dict[str, torch.dtype]] = {}
    for name in _saved_names(model).values():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        # LoRA layers cast their input to the adapter, and QuantizedLinear casts its bias to the input.
        casts = id(parameters[name]) in of_lora or isinstance(owner, QuantizedLinear)
        if not casts and parameters[name].dtype != adapter_dtype:
            own_dtypes.setdefault(owner, {})[leaf] = parameters[name].dtype
    for name in _saved_names(model).values():
        parameters[name].data = parameters[name].data.to(adapter_dtype)
    for owner, dtypes in own_dtypes.items():
        owner.forward = partial(_forward_with_dtypes, owner, dtypes)


def _forward_with_dtypes(module: nn.Module, dtypes: dict[str, torch.dtype], /, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward with masters cast to the dtypes they stand for, as FSDP2's mixed precision does.

    Where FSDP2 has cast them already there is nothing to do. The inner call comes through here again.
    """
    masters = {name: getattr(module, name) for name in dtypes}
    cast = {name: master.to(dtypes[name]) for name, master in masters.items() if master.dtype != dtypes[name]}
    if not cast:
        return type(module).forward(module, *args, **kwargs)
    return torch.func.functional_call(module, cast, args, kwargs)


def _saved_names(model: PeftModel) -> dict[str, str]:
    """Key in a saved adapter -> name of the parameter in the model, for every tensor that PEFT saves."""
    keys = {key: key for key in model.state_dict()}
    # PEFT picks and renames entries without looking at them, so names can stand in for tensors.
    return get_peft_model_state_dict(model, state_dict=keys, adapter_name=ADAPTER_NAME, save_embedding_layers=False)


def _mismatches(weights: Any, parameters: dict[str, nn.Parameter]) -> list[str]:
    stored = set(weights.keys())
    problems = []
    for what, keys in (("missing", parameters.keys() - stored), ("unexpected", stored - parameters.keys())):
        if keys:
            listed = sorted(keys)
            problems.append(f"{len(keys)} {what} ({', '.join(listed[:4])}{', ...' if len(keys) > 4 else ''})")
    for key in sorted(parameters.keys() & stored):
        shape = tuple(weights.get_slice(key).get_shape())
        if shape != tuple(parameters[key].shape):
            problems.append(f"{key} is {shape}, the model needs {tuple(parameters[key].shape)}")
    return problems


def _weights_file(adapter_name_or_path: str, **hub_kwargs: Any) -> str:
    def find(name: str) -> str | None:
        return cached_file(adapter_name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)

    path = find(WEIGHTS_NAME)
    if path is not None:
        return path
    if find("adapter_model.bin") is not None:
        raise ConfigError(
            f"the adapter in {adapter_name_or_path!r} is a pickle (adapter_model.bin), which can run code when it is "
            f"read. Load it with peft and save it again, which writes {WEIGHTS_NAME}."
        )
    raise ConfigError(
        f"there is no {WEIGHTS_NAME} in {adapter_name_or_path!r}. adapter_name_or_path needs a saved PEFT adapter."
    )
