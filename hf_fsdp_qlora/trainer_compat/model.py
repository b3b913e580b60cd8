"""What `attach` changes on the model itself. Nothing here touches other models.

Attributes are set on the instance, so a class that other models share is never changed, except for the name of the
classes that `fully_shard` generates.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_fsdp_qlora.checkpoint import StoredTensor
from hf_fsdp_qlora.distributed import rank
from hf_fsdp_qlora.engine import Engine, Offload
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.export import adapter_entries, gather_adapter, write_peft_directory
from hf_fsdp_qlora.fsdp1 import is_wrapped
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.precision import Precision, resolve_precision
from hf_fsdp_qlora.sharding import allow_forward_method, end_forward, is_sharded
from hf_fsdp_qlora.trainer_compat.walks import set_quick_walks

_ATTRIBUTE = "hf_fsdp_qlora_attachment"


@dataclass(frozen=True)
class Attachment:
    """Marks a model as ours, and says who distributes it.

    Attributes:
        engine: see `attach`.
        precision: the dtypes of the run.
        offload: what lives in host memory.
        stored: where its weights are in the checkpoint, by the model's names.
        num_weights: see flops.py.
    """

    engine: Engine
    precision: Precision = resolve_precision(None)
    offload: Offload = "none"
    stored: Mapping[str, StoredTensor] | None = None
    num_weights: int = 0


def attachment(model: Any) -> Attachment | None:
    """What `attach` left on this model, None if it is not ours."""
    return getattr(model, _ATTRIBUTE, None)


def prepare_model(model: PreTrainedModel | PeftModel, attached: Attachment) -> None:
    """Set the marker and everything that follows from it on this one model."""
    setattr(model, _ATTRIBUTE, attached)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    model.register_state_dict_post_hook(_leave_out_frozen)
    set_quick_walks(model)
    if attached.precision.autocast_dtype is not None:
        _open_autocast({model, base}, attached.precision.autocast_dtype)
    base.resize_token_embeddings = functools.partial(_resize_token_embeddings, base)
    if isinstance(model, PeftModel):
        model.save_pretrained = functools.partial(_save_pretrained, model)  # type: ignore[method-assign]
    elif any(isinstance(module, QuantizedLinear) for module in model.modules()):
        model.save_pretrained = _refuse_to_save  # type: ignore[method-assign]
    if attached.engine == "fsdp1":
        base.generate = _refuse_generate
    if attached.engine == "fsdp2":
        sharded: list[Any] = [module for module in model.modules() if is_sharded(module)]
        for module in sharded:
            _restore_class_name(type(module))
        model.register_forward_hook(functools.partial(_end_forward, sharded))
        _set_compute_device(base)
        # torch asks for this; the Trainer does it too, but only when training begins. Twice is fine.
        allow_forward_method(model, "generate")


def _refuse_generate(*_: Any, **__: Any) -> None:
    """Stands in for `generate` until the trainer has wrapped the model (wrapping.py).

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "Under FSDP1 the model can generate once the trainer has wrapped it. Call trainer.evaluate() or "
        "trainer.train() first, or use FSDP2."
    )


def _open_autocast(modules: set[torch.nn.Module], dtype: torch.dtype) -> None:
    """Run forwards under autocast, whether they begin at the adapter or, in generation, at the base model.

    accelerate opens one from `mixed_precision`, but not under FSDP2:
    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py (_prepare_fsdp2)
    """
    open_ones: list[torch.autocast] = []

    def enter(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        open_ones.append(torch.autocast(device, dtype))
        open_ones[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ones.pop().__exit__(None, None, None)

    for module in modules:
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)


def _end_forward(sharded: list[torch.nn.Module], *_: Any) -> None:
    """After a forward without backward, bring the group [final norm, head] to rest.

    TRL's fused head never calls `lm_head`, so the group's forward is never complete: FSDP2 would not gather it for the
    next one, which fails if a save has sharded it in between (evaluate, save, train), and would keep it gathered while
    the optimizer is made or saved. Backward does the same by itself.
    Fixed in torch by https://github.com/pytorch/pytorch/pull/180428; can go when torch 2.11 is no longer supported.
    """
    if not torch.is_grad_enabled():
        end_forward(sharded)


def _set_compute_device(base: PreTrainedModel) -> None:
    """Under CPU offload, or with the embedding in host memory, let `base.device` say where the model computes.

    transformers takes the device of the first parameter, and generation moves its inputs there, to the CPU:
    https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/modeling_utils.py (device)
    The property is overridden in a class of this instance alone. Can go when generation follows its inputs' device.
    """
    shards = [parameter for parameter in base.parameters() if isinstance(parameter, DTensor)]
    if shards and next(base.parameters()).device.type != shards[0].device_mesh.device_type:
        device = torch.device(shards[0].device_mesh.device_type, torch.accelerator.current_device_index())
        stock = type(base)
        members = {"device": property(lambda _: device), "__module__": stock.__module__}
        base.__class__ = type(stock.__name__, (stock,), members)


def _leave_out_frozen(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """State-dict hook: an empty tensor for each frozen entry, so that no save gathers or writes the base.

    The keys stay, because torch pops frozen entries by name (`ignore_frozen_params`):
    https://github.com/pytorch/pytorch/blob/v2.11.0/torch/distributed/checkpoint/state_dict.py
    Can go when `Accelerator.get_state_dict` and `Trainer._save` ask for an adapter's entries only.
    """
    if is_wrapped(module):  # names and tensors are FSDP1's own; `gather_adapter` does not come this way then
        return
    parameters = dict(module.named_parameters(remove_duplicate=False))
    adapter: set[str] = set()
    if isinstance(module, PeftModel):
        own_names = {name: name for name in parameters}
        for adapter_name in module.peft_config:
            adapter.update(adapter_entries(module, own_names, adapter_name=adapter_name).values())
    for name, parameter in parameters.items():
        if not parameter.requires_grad and name not in adapter:
            state_dict[prefix + name] = torch.empty(0)


def _save_pretrained(
    model: PeftModel,
    save_directory: str,
    *args: Any,
    state_dict: dict[str, torch.Tensor] | None = None,
    is_main_process: bool | None = None,
    **kwargs: Any,
) -> None:
    """`PeftModel.save_pretrained` that gathers first. On a sharded model call it on every rank.

    The stock method would hand sharded tensors to safetensors, and every rank would write:
    https://github.com/huggingface/peft/blob/v0.21.0/src/peft/peft_model.py
    The Trainer calls this on the writing rank alone, with a gathered `state_dict` under FSDP and without one
    elsewhere, so nothing but the gathering of shards may communicate. Can go when PEFT gathers sharded adapters.
    """
    if state_dict is None:
        state_dict = gather_adapter(model)
    if is_main_process if is_main_process is not None else rank() == 0:
        write_peft_directory(model, save_directory, state_dict, *args, **kwargs)


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """`save_pretrained` of a quantised model without an adapter: its rows are not a checkpoint that anything loads."""
    raise ConfigError(
        "A quantised model without an adapter cannot be saved. To write a 4-bit checkpoint use `hf-fsdp-qlora "
        "quantize`; to train and save an adapter pass peft_config to load_model."
    )


def _resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> torch.nn.Module:
    """Refuse to change the vocabulary of a loaded model; resizing to the size it has is fine.

    SFTConfig's `chat_template_path` does this (TRL's `clone_chat_template`). The new rows would be neither sharded nor
    saved. Can go when embeddings are resized while loading.
    """
    embeddings = model.get_input_embeddings()
    have = embeddings.weight.shape[0]
    need = have if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        need = -(-need // pad_to_multiple_of) * pad_to_multiple_of
    if need != have:
        raise ConfigError(
            f"The embeddings have {have} rows and cannot be resized to {need} once the model is loaded. If this comes "
            "from chat_template_path, give it a .jinja file, which adds no tokens; to add tokens, resize the "
            "checkpoint with transformers, save it, and load that."
        )
    return embeddings


def _restore_class_name(sharded_class: type) -> None:
    """Give a class that `fully_shard` generated ("FSDPLlamaDecoderLayer") the name of the class it stands for.

    accelerate looks for layers by class name before it notices that the model is sharded already:
    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py (_prepare_fsdp2)
    Can go when accelerate checks for `FSDPModule` before `set_auto_wrap_policy`.
    """
    original = next(base for base in sharded_class.__bases__ if issubclass(base, torch.nn.Module))
    sharded_class.__name__, sharded_class.__qualname__ = original.__name__, original.__qualname__
