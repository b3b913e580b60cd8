"""The rules of `validate` that need the model's config: names, lengths and predicted memory."""

from __future__ import annotations

import re
from typing import Any

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.memory_settings import GIB, HQQ_BITS, OPTIMIZER_STATE_BYTES, MemorySettings
from hf_fsdp_qlora.model_shape import ModelShape
from hf_fsdp_qlora.planning import cheapest_change
from hf_fsdp_qlora.validation import Problem, Rule, Run

WHOLE_MODULES = {
    "replicate_head": {"lm_head", "embed_out", "norm", "final_layer_norm"},
    "embedding_on_host": {"embed_tokens", "embed_in"},
}
"""What the options of outside.py keep whole, as the supported architectures name it."""


def wrapped_classes_exist(run: Run) -> Problem | None:
    """accelerate: "Could not find the transformer layer class ... in the model"."""
    assert run.model is not None
    value = run.fsdp("fsdp_transformer_layer_cls_to_wrap")
    policy = str(run.fsdp("fsdp_auto_wrap_policy") or "").upper()
    if not run.fsdp_version or not value or policy != "TRANSFORMER_BASED_WRAP":
        return None
    names = [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]
    unknown = [name for name in names if name not in run.model.classes]
    if not unknown:
        return None
    layers = ", ".join(sorted(name for name in run.model.classes if name.endswith(("DecoderLayer", "Layer"))))
    return Problem(
        "fsdp_config.fsdp_transformer_layer_cls_to_wrap", value,
        f"{', '.join(unknown)} is no class of {run.model.name}; accelerate raises after the model is loaded.",
        f"Set fsdp_auto_wrap_policy: NO_WRAP (load_model has wrapped the layers), or name {layers}.",
    )  # fmt: skip


def targets_match(run: Run) -> Problem | None:
    """PEFT raises if nothing matches, and is silent about names that match nothing beside others that do."""
    targets = run.get("lora_target_modules")
    if not run.get("use_peft") or targets is None:
        return None
    names = [targets] if isinstance(targets, str) else list(targets)
    if names == ["all-linear"]:
        return None
    unmatched = [name for name in names if not _matches(run, name if isinstance(targets, str) else [name])]
    if not unmatched:
        return None
    leaves = ", ".join(sorted({linear.leaf for linear in _shape(run).linears}))
    return Problem(
        "lora_target_modules", targets,
        f"{', '.join(unmatched)} matches no linear layer of {_shape(run).name}.",
        f"It has {leaves}; all-linear means all of them.",
    )  # fmt: skip


def sequences_fit_the_model(run: Run) -> Problem | None:
    """Positions beyond max_position_embeddings were never trained, and fixed position tables end there."""
    limit, length = _shape(run).max_positions, run.get("max_length")
    if not limit or length is None or length <= limit:
        return None
    return Problem(
        "max_length", length,
        f"{_shape(run).name} has positions for {limit} tokens (max_position_embeddings).",
        f"Set max_length: {limit} or less, or scale the rotary embedding in the model's config.",
    )  # fmt: skip


def whole_parameters_are_frozen(run: Run) -> Problem | None:
    """FSDP2 would neither shard nor reduce what `outside.py` keeps whole, so that must be frozen and not tied."""
    options = [key for key in ("replicate_head", "embedding_on_host") if run.get(key)]
    if not options:
        return None
    whole = set().union(*(WHOLE_MODULES[key] for key in options))
    named = sorted(name for name in run.get("lora_modules_to_save") or () if name.rpartition(".")[2] in whole)
    if _shape(run).head_numel and not named:
        return None
    tied = f"{_shape(run).name} ties its head to the embedding"
    why = f"{named[0]} is trained (lora_modules_to_save)" if named else tied
    return Problem(
        options[0], True, f"{why}, and what is kept whole is neither sharded nor reduced; load_model refuses it.",
        f"Remove {' and '.join(options)}" + (f", or take {named[0]} out of lora_modules_to_save." if named else "."),
    )  # fmt: skip


def memory_fits(run: Run) -> Problem | None:
    """The planner's prediction (memory.py) against the card.

    Raises:
        ConfigError: the planner cannot place the settings, such as ones that another rule refuses.
    """
    if run.model is None or run.gpu_memory_bytes is None:
        return None
    settings = memory_settings(run)
    estimate = estimate_memory(_shape(run), settings)
    if estimate.fits(run.gpu_memory_bytes):
        return None
    change = cheapest_change(_shape(run), settings, run.gpu_memory_bytes)
    return Problem(
        "per_device_train_batch_size", run.get("per_device_train_batch_size"),
        f"A GPU would need {estimate.needed_bytes / GIB:.1f} GiB ({estimate.peak_bytes / GIB:.1f} allocated at the "
        f"peak, in {estimate.highest_moment}); it has {run.gpu_memory_bytes / GIB:.1f}.",
        f"Cheapest change that fits: {change[0]}." if change else "Use more or larger GPUs; no setting alone fits.",
    )  # fmt: skip


def memory_settings(run: Run) -> MemorySettings:
    """The planner's view of a run.

    Raises:
        ConfigError: the planner does not know the optimizer, the format, what is trained, or what is recomputed.
    """
    optimizer = str(run.get("optim"))
    if optimizer not in OPTIMIZER_STATE_BYTES:
        raise ConfigError(f"the planner does not know optim={optimizer}")
    checkpointed = run.recipe.get("checkpoint_layers")
    if checkpointed is not None and run.get("gradient_checkpointing"):
        raise ConfigError(f"the planner does not know checkpoint_layers={checkpointed}")
    targets = run.get("lora_target_modules") or "all-linear"
    nodes = int(run.accelerate.get("num_machines") or 1)
    engines = {"FSDP": f"fsdp{run.fsdp_version}", "MULTI_GPU": "ddp" if run.num_processes > 1 else "none"}
    batch_size = int(run.get("per_device_train_batch_size"))
    values: dict[str, Any] = dict(
        engine=engines.get(run.distributed_type, "none"),
        gpus=max(1, run.num_processes // nodes), nodes=nodes, replicas=run.replicas,
        offload=run.offload, replicate_head=bool(run.get("replicate_head")) and run.fsdp_version == 2,
        embedding_on_host=bool(run.get("embedding_on_host")), dtype=run.dtype or "bfloat16",
        adapter_dtype=run.get("adapter_dtype"), lora_r=int(run.get("lora_r")),
        lora_dropout=float(run.get("lora_dropout")), optimizer=optimizer, batch_size=batch_size,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        modules_to_save=tuple(run.get("lora_modules_to_save") or ()),
        seq_len=int(run.get("max_length") or _shape(run).max_positions or 1024),
        gradient_accumulation_steps=int(run.get("gradient_accumulation_steps")),
        gradient_checkpointing=bool(run.get("gradient_checkpointing")),
        activation_offloading=bool(run.get("activation_offloading") and run.get("gradient_checkpointing")),
        padded=batch_size > 1 and not run.get("packing"),
        compile_layers=bool(run.recipe.get("compile_layers")), activation_budget=run.recipe.get("activation_budget"),
    )  # fmt: skip
    if values["target_modules"] == ("all-linear",):
        values["target_modules"] = "all-linear"
    return MemorySettings(**{**values, **_method(run)})


def _method(run: Run) -> dict[str, Any]:
    """What is trained, and the format of what is not."""
    active = run.get("rotary_active")
    if active:
        share = re.fullmatch(r"([0-9.]+)\s*%", str(active))
        if share is None:
            raise ConfigError(f"the planner knows rotary_active as a share of the parameters (10%), not as {active}")
        keys = {"rotary_frozen": "rotary_frozen", "rotary_master_dtype": "master_dtype"}
        given = {ours: run.recipe[key] for key, ours in keys.items() if key in run.recipe}
        return dict(method="rotary", active_fraction=float(share[1]) / 100, lora_dropout=0.0, **given)
    if run.get("int8_type") or run.get("hqq_nbits") not in (None, HQQ_BITS):
        raise ConfigError(f"the planner knows NF4, FP4 and HQQ with {HQQ_BITS} bits in a recipe, not this format")
    if run.get("hqq_nbits"):
        return dict(method="qlora", quant_format="hqq", block_size=run.recipe.get("hqq_group_size"))
    if run.get("load_in_4bit"):
        nested, blocksize = bool(run.get("use_bnb_nested_quant")), int(run.get("bnb_4bit_blocksize"))
        return dict(method="qlora", double_quant=nested, block_size=blocksize)
    return dict(method="lora")


def _shape(run: Run) -> ModelShape:
    assert run.model is not None and run.model.shape is not None
    return run.model.shape


def _matches(run: Run, targets: Any) -> bool:
    try:
        return bool(_shape(run).targeted(targets))
    except ConfigError:
        return False


MODEL_RULES: tuple[Rule, ...] = (
    wrapped_classes_exist, targets_match, sequences_fit_the_model, whole_parameters_are_frozen,
)  # fmt: skip
