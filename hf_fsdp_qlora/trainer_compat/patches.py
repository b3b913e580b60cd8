"""Replacements for a few functions of accelerate and transformers, for our models only. Those that set a run up are
below; `install` lists all of them, and where the others are.

Each `_patched_*` below is a factory: it takes the stock function and returns the one to put in its place, which calls
the stock one for every model that `attach` has not marked. `install` puts them in place, once per process.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import transformers.trainer
import transformers.trainer_utils
from accelerate import Accelerator, PartialState
from accelerate.state import is_initialized
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer

from hf_fsdp_qlora.distributed import local_rank, rank, world_size
from hf_fsdp_qlora.engine import launched_config, resolve_replicas
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.precision import check_mixed_precision
from hf_fsdp_qlora.trainer_compat.evaluation import patched_evaluate
from hf_fsdp_qlora.trainer_compat.flops import patched_floating_point_ops
from hf_fsdp_qlora.trainer_compat.full_training import WHOLE_MODEL_PATCHES, full_training
from hf_fsdp_qlora.trainer_compat.logs import with_log_sources
from hf_fsdp_qlora.trainer_compat.loss_filter import (
    patched_inner_training_loop,
    patched_track_num_input_tokens,
    patched_training_step,
)
from hf_fsdp_qlora.trainer_compat.model import Attachment, attachment
from hf_fsdp_qlora.trainer_compat.saving import ADAPTER_PATCHES
from hf_fsdp_qlora.trainer_compat.unfinished import patched_get_last_checkpoint, patched_save_checkpoint
from hf_fsdp_qlora.trainer_compat.wrapping import (
    patched_create_optimizer,
    patched_get_state_dict,
    patched_prepare_model,
    patched_save_fsdp_optimizer,
    patched_wrap_model,
)
from hf_fsdp_qlora.validation import Run, apply_rules, raise_for
from hf_fsdp_qlora.validation_rules import TRAINER_RULES


@functools.cache
def install() -> None:
    """Put the replacements in place. Safe to call again."""
    for owner, name, patched in (
        (Trainer, "create_accelerator_and_postprocess", _patched_create_accelerator),
        (Accelerator, "_prepare_fsdp2", _patched_prepare_fsdp2),
        (Accelerator, "prepare_model", _patched_prepare_model),
        (Accelerator, "prepare_model", patched_prepare_model),
        (Accelerator, "get_state_dict", patched_get_state_dict),
        (Trainer, "_wrap_model", patched_wrap_model),
        (Trainer, "create_optimizer", patched_create_optimizer),
        (transformers.trainer, "save_fsdp_optimizer", patched_save_fsdp_optimizer),
        (Trainer, "_save_checkpoint", patched_save_checkpoint),
        (transformers.trainer, "get_last_checkpoint", patched_get_last_checkpoint),
        (transformers.trainer_utils, "get_last_checkpoint", patched_get_last_checkpoint),
        (Trainer, "evaluate", patched_evaluate),
        (Trainer, "log", with_log_sources),
        (Trainer, "floating_point_ops", patched_floating_point_ops),
        (Trainer, "_inner_training_loop", patched_inner_training_loop),
        (Trainer, "training_step", patched_training_step),
        (Trainer, "_track_num_input_tokens", patched_track_num_input_tokens),
        *ADAPTER_PATCHES,
        *WHOLE_MODEL_PATCHES,
    ):
        setattr(owner, name, patched(getattr(owner, name)))


def _patched_create_accelerator(stock: Any) -> Any:
    """Settle, right after the Trainer made its Accelerator, what accelerate gets wrong about a loaded model."""

    @functools.wraps(stock)
    def create_accelerator_and_postprocess(trainer: Trainer) -> None:
        attached = attachment(trainer.model)
        if attached is not None and attached.engine == "fsdp2" and resolve_replicas() > 1:
            _announce_replicas()
        stock(trainer)
        if attached is None:
            return
        _check_settings(trainer, attached)
        if attached.engine in ("fsdp1", "fsdp2"):
            _enter_fsdp(trainer, attached.engine)
        if attached.engine == "fsdp2":
            # `evaluate` before `train` would call `Accelerator.prepare` without an optimizer, which raises; there is
            # nothing to prepare. Can go with https://github.com/huggingface/transformers/issues/48841 (and 39961).
            trainer.accelerator._models.append(trainer.model)

    return create_accelerator_and_postprocess


def _check_settings(trainer: Trainer, attached: Attachment) -> None:
    names = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "optim", "save_on_each_node",
             "save_only_model", "save_strategy")  # fmt: skip
    launched = launched_config(attached.engine, trainer.accelerator.device)
    settings = {name: getattr(trainer.args, name) for name in names}
    settings["rotary_active"] = full_training(trainer.model) is not None
    raise_for(apply_rules(TRAINER_RULES, Run(launched, settings)))
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and f"fsdp{plugin.fsdp_version}" != attached.engine:
        raise ConfigError(
            f"accelerate is set up for FSDP{plugin.fsdp_version}, but the model was loaded for {attached.engine!r}. "
            'Leave load_model\'s fsdp at "auto", or launch with a config of that kind.'
        )
    seen = trainer.accelerator.num_processes
    if attached.engine not in ("fsdp1", "fsdp2") and world_size() > seen:
        raise ConfigError(
            f"{world_size()} processes were launched, but accelerate sees {seen}: each would train alone. On CPU set "
            "use_cpu=True in the training arguments."
        )
    model: Any = trainer.model
    formats = [m.backend.format for m in model.modules() if isinstance(m, QuantizedLinear)]
    four_bit = any(2 * rows.code_bytes <= rows.row_size for rows in formats)
    check_mixed_precision(attached.precision, trainer.accelerator.mixed_precision, four_bit=four_bit)
    if attached.engine == "fsdp1" and plugin is not None and "FULL" not in str(plugin.state_dict_type):
        raise ConfigError(
            f"fsdp_state_dict_type: {plugin.state_dict_type.name} with FSDP1 cannot be resumed by another engine. Set "
            "FULL_STATE_DICT: only adapters and their optimizer states are gathered, never the base."
        )
    if trainer.args.bf16_full_eval or trainer.args.fp16_full_eval:
        raise ConfigError(
            "bf16_full_eval and fp16_full_eval would cast the fp32 adapters for good. Leave them out: the model "
            "evaluates in the dtype it was loaded with."
        )


def _enter_fsdp(trainer: Trainer, engine: str) -> None:
    """Tell accelerate that this is FSDP, where it did not find out: on CPU. With `use_cpu` it selects MULTI_CPU and
    would wrap the model in DDP; without, it opens the process group and then believes that there is one process.

    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/state.py (PartialState, AcceleratorState; no
    issue is open). Can go when FSDP on CPU is selected there.
    """
    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.FSDP:
        return
    facts = _facts_on_cpu(DistributedType.FSDP)
    vars(state).update(facts)
    # AcceleratorState copies these back whenever one is constructed, as the optimizer wrapper does.
    PartialState._shared_state.update(facts)
    # It reads the other settings from FSDP_*, as Accelerator does. FSDP1 cannot broadcast on CPU while it wraps.
    settings = {"fsdp_version": 2} if engine == "fsdp2" else {"fsdp_version": 1, "cpu_ram_efficient_loading": False}
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
    trainer.is_fsdp_enabled = True


def _announce_replicas() -> None:
    """On CPU, have accelerate take the FSDP path from the beginning: with a `parallelism_config` it refuses MULTI_CPU
    before `_enter_fsdp` can correct it. MULTI_GPU is what it turns into FSDP by the launcher's environment.

    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/parallelism_config.py (_validate_accelerator)
    Can go with `_enter_fsdp`.
    """
    if PartialState().device.type == "cpu" and not is_initialized():
        PartialState._shared_state.update(_facts_on_cpu(DistributedType.MULTI_GPU))


def _facts_on_cpu(distributed_type: DistributedType) -> dict[str, Any]:
    return {
        "distributed_type": distributed_type,
        "backend": dist.get_backend(),
        "device": torch.device("cpu"),  # with use_cpu it has an index, which FSDP1 takes for another device
        "num_processes": world_size(),
        "process_index": rank(),
        "local_process_index": local_rank(),
    }


def _patched_prepare_fsdp2(stock: Any) -> Any:
    """Keep the optimizer's parameters as they are: the model is sharded already, so there is nothing to swap.

    accelerate swaps them by `data_ptr()` of the local shard, and empty shards (LoRA rank below the number of shards)
    all have the same: one parameter then stands for many, and the first save aborts.
    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/fsdp_utils.py
    (fsdp2_switch_optimizer_parameters). Can go when accelerate skips the swap for an `FSDPModule`.
    """

    @functools.wraps(stock)
    def _prepare_fsdp2(accelerator: Accelerator, *args: Any) -> Any:
        ours = any(attachment(item) for item in args if isinstance(item, torch.nn.Module))
        kept = {
            index: [list(group["params"]) for group in item.param_groups]
            for index, item in enumerate(args)
            if ours and isinstance(item, torch.optim.Optimizer)
        }
        result = stock(accelerator, *args)
        for index, groups in kept.items():
            for group, parameters in zip(result[index].param_groups, groups, strict=True):
                group["params"] = parameters
        return result

    return _prepare_fsdp2


def _patched_prepare_model(stock: Any) -> Any:
    """Let training wrap a model in DDP that was evaluated before. `evaluate` before `train` marks the model as
    prepared, and the mark makes accelerate skip DDP when training begins: every rank would train alone, silently.

    Since https://github.com/huggingface/accelerate/pull/3977. Can go when `evaluation_mode` no longer sets
    `_is_accelerate_prepared`.
    """

    @functools.wraps(stock)
    def prepare_model(accelerator: Accelerator, model: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = stock(accelerator, model, *args, **kwargs)
        attached = attachment(model)
        ours = attached is not None and attached.engine not in ("fsdp1", "fsdp2")
        if ours and kwargs.get("evaluation_mode") and accelerator.num_processes > 1:
            prepared._is_accelerate_prepared = False
        return prepared

    return prepare_model
