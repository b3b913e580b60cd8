"""FSDP1 through accelerate: what it must be told before it wraps, and what it would do wrong afterwards.

accelerate wraps our model when the trainer prepares it, with the user's sharding strategy, prefetching and
`use_orig_params`. Units, dtypes, offload and broadcasting are decided by `load_model` and set on the plugin here; what
the Trainer puts there for PEFT (`update_fsdp_plugin_peft`) is replaced by the same units with our dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import Trainer

from hf_fsdp_qlora import fsdp1
from hf_fsdp_qlora.distributed import world_size
from hf_fsdp_qlora.export import gather_adapter
from hf_fsdp_qlora.sharding import shard_again
from hf_fsdp_qlora.skeleton import decoder_layers
from hf_fsdp_qlora.trainer_compat.checkpoints import save_optimizer
from hf_fsdp_qlora.trainer_compat.model import attachment


def patched_prepare_model(stock: Any) -> Any:
    """Wrap our model with our units and dtypes. An evaluation before training wraps it too: there are no values on
    the other ranks before that. Can go when accelerate's plugin takes a policy per unit."""

    @functools.wraps(stock)
    def prepare_model(accelerator: Accelerator, model: Any, *args: Any, **kwargs: Any) -> Any:
        attached = attachment(model)
        if attached is None or attached.engine != "fsdp1" or fsdp1.is_wrapped(model):
            return stock(accelerator, model, *args, **kwargs)
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        arguments = fsdp1.unit_arguments(
            model,
            decoder_layers(base),
            precision=attached.precision,
            offload=attached.offload,
            device=accelerator.device,
        )
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = arguments["mixed_precision"]
        for name in ("auto_wrap_policy", "sync_module_states", "cpu_offload", "param_init_fn"):
            setattr(plugin, name, arguments[name])
        with _without_upcast(), _without_retying(model):
            prepared = stock(accelerator, model, *args, **{**kwargs, "evaluation_mode": False})
        fsdp1.finish(prepared)
        base.generate = functools.partial(_generate, prepared, base)
        # As under FSDP2, see prepare_model in model.py.
        base._is_fsdp_managed_module = True
        return prepared

    return prepare_model


def patched_wrap_model(stock: Any) -> Any:
    """Let training go on with the model that an evaluation wrapped. The Trainer keeps it as `model` and the bare one
    as `model_wrapped`, and then makes no optimizer.

    https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/trainer.py (evaluation_loop)
    Can go with https://github.com/huggingface/transformers/issues/39961.
    """

    @functools.wraps(stock)
    def _wrap_model(trainer: Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        ours = attachment(trainer.model)
        if ours is not None and ours.engine == "fsdp1" and getattr(trainer.model, "module", None) is model:
            return trainer.model
        return stock(trainer, model, *args, **kwargs)

    return _wrap_model


def patched_create_optimizer(stock: Any) -> Any:
    """Give the optimizer FSDP2's shards. A forward before training, of an evaluation or a generation, leaves the group
    [final norm, head] gathered; the optimizer would then get its whole tensors, which are thrown away with the next
    sharding: a trained head would stay as it is, and the first save would raise. Can go when accelerate maps gathered
    parameters to their shards (`_prepare_fsdp2`)."""

    @functools.wraps(stock)
    def create_optimizer(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        ours = attachment(trainer.model)
        if ours is not None and ours.engine == "fsdp2":
            shard_again(trainer.model)  # type: ignore[arg-type]
        return stock(trainer, *args, **kwargs)

    return create_optimizer


def patched_get_state_dict(stock: Any) -> Any:
    """Gather the adapter and nothing else; stock code gathers the whole base on rank 0 to throw it away.

    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py (get_state_dict)
    Can go when it asks for an adapter's entries only.
    """

    @functools.wraps(stock)
    def get_state_dict(accelerator: Accelerator, model: Any, *args: Any, **kwargs: Any) -> Any:
        inner = getattr(model, "module", None)
        if fsdp1.is_wrapped(model) and attachment(model) is not None and isinstance(inner, PeftModel):
            return gather_adapter(inner)
        return stock(accelerator, model, *args, **kwargs)

    return get_state_dict


def patched_save_fsdp_optimizer(stock: Any) -> Any:
    """Save FSDP1's state as every engine here reads it. torch's is wrong on CPU, and in it parameters of one unit
    share a step counter, which other engines then advance once for each (see fsdp1.py). Can go when torch copies them.

    FSDP2's whole state goes the same way, so that a full disk stops every rank; a sharded one is written by
    torch.distributed.checkpoint, which sees to that itself. Can go when accelerate compares the ranks' outcomes.
    """

    @functools.wraps(stock)
    def save_fsdp_optimizer(
        plugin: Any, accelerator: Accelerator, optimizer: Any, model: Any, output_dir: str, *args: Any, **kwargs: Any
    ) -> None:
        ours = attachment(model)
        if ours is not None and ours.engine == "fsdp2":
            shard_again(model)  # an evaluation left the head's group gathered; torch 2.11 would not find its shards
        if ours is not None and "FULL_STATE_DICT" in str(plugin.state_dict_type):
            save_optimizer(model, optimizer, Path(output_dir))
        else:
            stock(plugin, accelerator, optimizer, model, output_dir, *args, **kwargs)

    return save_fsdp_optimizer


@contextmanager
def _without_upcast() -> Iterator[None]:
    """Keep accelerate from turning bf16 adapters into fp32 ones: our precision preset says what they are.

    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py (prepare_model, upcasted_log)
    The loop runs unless `mixed_precision` is "no"; nothing else in prepare_model reads that property. Can go when it
    leaves parameters alone whose dtype the policy's owner chose.
    """
    stock = Accelerator.mixed_precision
    Accelerator.mixed_precision = property(lambda _: "no")  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Accelerator.mixed_precision = stock  # type: ignore[method-assign]


@contextmanager
def _without_retying(model: Any) -> Iterator[None]:
    """Keep accelerate from tying weights again: our `param_init_fn` keeps them tied. accelerate's wrapper around it
    holds the whole weight of every name in `_tied_weights_keys`, tied or not: the head. And it stays, on the GPU of
    every rank but 0, where that weight was made: in the plugin, and in a reference cycle of torch's wrapping
    (`_post_order_apply`), which nothing breaks before a full garbage collection.

    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/fsdp_utils.py (ensure_weights_retied)
    Can go when it holds no parameters.

    Args:
        model: a PeftModel, which reads the attribute from its base unless it has one of its own.
    """
    model._tied_weights_keys = None
    try:
        yield
    finally:
        del model._tied_weights_keys


def _generate(root: Any, base: Any, *args: Any, **kwargs: Any) -> Any:
    """Generation calls the model inside the root unit, so what the root holds must be gathered first."""
    if world_size() > 1:
        kwargs.setdefault("synced_gpus", True)
    with torch.no_grad(), fsdp1.whole_root(root):
        return type(base).generate(base, *args, **kwargs)
