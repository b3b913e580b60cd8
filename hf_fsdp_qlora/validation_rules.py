"""The rules of `validate` that need no model. One rule is one function: a `Run` in, a `Problem` or None out.

Every rule rests on something that was read in the installed sources or seen to happen (transformers 5.23, accelerate
1.15, trl 1.16, peft 0.21, bitsandbytes 0.50); its docstring says which.
"""

from __future__ import annotations

from collections.abc import Callable

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.validation import Problem, Run, is_true

Rule = Callable[[Run], Problem | None]
ENGINES = ("NO", "MULTI_GPU", "FSDP")
BITSANDBYTES_OPTIMIZERS = (
    "adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit",
)  # fmt: skip


def distributed_type_is_supported(run: Run) -> Problem | None:
    """`load_model` looks for FSDP in accelerate's environment and takes several processes for DDP otherwise."""
    if run.distributed_type in ENGINES:
        return None
    if run.distributed_type == "MULTI_CPU":
        return Problem(
            "distributed_type", "MULTI_CPU",
            "accelerate launch starts one process only with it, whatever num_processes says.",
            "Use accelerate_configs/cpu_fsdp2.yaml (distributed_type: FSDP with use_cpu: true).",
        )  # fmt: skip
    return Problem(
        "distributed_type", run.distributed_type,
        "The model is loaded for one process, for DDP or for FSDP; another engine would shard it again or not at all.",
        f"Use one of {', '.join(ENGINES)}, such as accelerate_configs/fsdp2.yaml.",
    )  # fmt: skip


def fsdp1_has_gpus(run: Run) -> Problem | None:
    """FullyShardedDataParallelPlugin raises RuntimeError ("no available devices found") on the CPU for FSDP1 with
    sync_module_states, which loading needs. accelerate takes version 1 where the version is not set."""
    if run.fsdp_version != 1 or not is_true(run.accelerate.get("use_cpu")):
        return None
    return Problem(
        "fsdp_config.fsdp_version", run.fsdp("fsdp_version"),
        "FSDP1 (accelerate's default where no version is set) needs accelerators: accelerate raises on the CPU.",
        "Set fsdp_version: 2, as accelerate_configs/cpu_fsdp2.yaml does.",
    )  # fmt: skip


def quant_storage_survives(run: Run) -> Problem | None:
    """FSDP2 copies shards in their dtype and rewrites NaN patterns of 16-bit ones (pytorch/pytorch#159333); FSDP1's
    flat parameters have one dtype, which mixed precision casts."""
    storage = run.get("bnb_4bit_quant_storage")
    if not run.get("load_in_4bit") or storage in (None, "uint8"):
        return None
    name = str(storage).removeprefix("torch.")
    if run.fsdp_version == 2 and name != "float32":
        return Problem(
            "bnb_4bit_quant_storage", name,
            "FSDP2 rewrites NaN bit patterns of 16-bit dtypes when it copies shards on CUDA: weights would be wrong.",
            "Leave bnb_4bit_quant_storage out; the storage is chosen for the engine.",
        )  # fmt: skip
    if run.fsdp_version == 1 and name != run.dtype:
        return Problem(
            "bnb_4bit_quant_storage", name,
            f"FSDP1 would cast the bytes to its mixed-precision dtype ({run.dtype}), which destroys them.",
            "Leave bnb_4bit_quant_storage out, or set it to the compute dtype.",
        )  # fmt: skip
    return None


def dtype_agrees_with_mixed_precision(run: Run) -> Problem | None:
    """accelerate adds no autocast under FSDP2, and load_model's policy follows `dtype`, whose default is float32;
    SFTConfig's bf16 is true unless fp16 is."""
    if run.fsdp_version != 2 or run.dtype is None or run.recipe.get("precision"):
        return None
    fp16 = bool(run.get("fp16"))
    bf16 = not fp16 if run.get("bf16") is None else bool(run.get("bf16"))
    wanted = "float16" if fp16 else "bfloat16" if bf16 else None
    if wanted in (None, run.dtype) or (is_true(run.accelerate.get("use_cpu")) and run.get("bf16") is None):
        return None
    return Problem(
        "dtype", run.dtype,
        f"The recipe asks for {wanted} mixed precision, but under FSDP2 the model computes in dtype={run.dtype}: "
        "nothing casts it, and weights that are not quantised, activations and traffic have that size.",
        f"Set dtype: {wanted}, or bf16: false and fp16: false to train in {run.dtype} knowingly.",
    )  # fmt: skip


def precision_agrees_with_the_rest(run: Run) -> Problem | None:
    """What load_model and the trainer refuse about a precision preset, and fp16 over 4-bit weights (precision.py)."""
    preset, wanted = run.recipe.get("precision"), run.recipe.get("bf16")
    launched = str(run.accelerate.get("mixed_precision") or "no").lower()
    mixed = "fp16" if run.get("fp16") else "bf16" if wanted else "no" if wanted is False else launched
    if preset is None and mixed != "fp16":
        return None
    from hf_fsdp_qlora.precision import check_mixed_precision, resolve_precision

    given = {key: run.recipe.get(key) for key in ("dtype", "adapter_dtype") if run.recipe.get(key) != "auto"}
    try:
        precision = resolve_precision(preset, **(given if preset else {}))
        check_mixed_precision(precision, mixed, four_bit=bool(run.get("load_in_4bit")))
    except ConfigError as error:
        return Problem("precision", preset or mixed, str(error), "Remove one of the two settings, as it says.")
    return None


def sync_module_states_is_on(run: Run) -> Problem | None:
    """Under FSDP1 rank 0 holds the loaded rows and the other ranks empty ones until accelerate broadcasts them.
    fsdp_cpu_ram_efficient_loading forces the broadcast on (FullyShardedDataParallelPlugin)."""
    if run.fsdp_version != 1:
        return None
    if is_true(run.fsdp("fsdp_sync_module_states")) or is_true(run.fsdp("fsdp_cpu_ram_efficient_loading")):
        return None
    return Problem(
        "fsdp_config.fsdp_sync_module_states", run.fsdp("fsdp_sync_module_states"),
        "Only rank 0 has the loaded weights until FSDP1 broadcasts them; the other ranks would train empty ones.",
        "Set fsdp_sync_module_states: true and fsdp_cpu_ram_efficient_loading: true.",
    )  # fmt: skip


def reshard_after_forward_has_its_versions_type(run: Run) -> Problem | None:
    """FullyShardedDataParallelPlugin: a truth value for FSDP2, a strategy's name for FSDP1, else it raises."""
    value = run.fsdp("fsdp_reshard_after_forward")
    if run.fsdp_version is None or value is None:
        return None
    is_flag = str(value).lower() in ("true", "false", "yes", "no", "1", "0", "on", "off", "y", "n", "t", "f")
    if run.fsdp_version == 2 and not is_flag:
        return Problem(
            "fsdp_config.fsdp_reshard_after_forward", value,
            "FSDP2 takes true or false here; accelerate raises a ValueError for a strategy's name.",
            "Set fsdp_reshard_after_forward: true (false keeps layers gathered and costs memory).",
        )  # fmt: skip
    if run.fsdp_version == 1 and isinstance(value, bool):
        return Problem(
            "fsdp_config.fsdp_reshard_after_forward", value,
            "FSDP1 takes a sharding strategy here; accelerate raises for a truth value.",
            "Set fsdp_reshard_after_forward: FULL_SHARD.",
        )  # fmt: skip
    return None


def state_dict_type_is_known_to_fsdp2(run: Run) -> Problem | None:
    """FullyShardedDataParallelPlugin.set_state_dict_type raises for LOCAL_STATE_DICT."""
    value = str(run.fsdp("fsdp_state_dict_type") or "")
    if run.fsdp_version != 2 or value.upper() not in ("LOCAL_STATE_DICT", "2"):
        return None
    return Problem(
        "fsdp_config.fsdp_state_dict_type", value,
        "FSDP2 has no LOCAL_STATE_DICT; accelerate raises on every rank.",
        "Set fsdp_state_dict_type: FULL_STATE_DICT.",
    )  # fmt: skip


def checkpointing_happens_once(run: Run) -> Problem | None:
    """The Trainer raises if both are on; alone, accelerate's calls the wrap policy, which NO_WRAP has none of
    (fsdp2_apply_ac: 'NoneType' object is not callable)."""
    if not run.fsdp_version or not is_true(run.fsdp("fsdp_activation_checkpointing")):
        return None
    field, fix = "fsdp_config.fsdp_activation_checkpointing", "Set fsdp_activation_checkpointing: false."
    if run.get("gradient_checkpointing"):
        why = "The recipe's gradient_checkpointing (true by default) does it already; the Trainer refuses both."
        return Problem(field, True, why, fix)
    if str(run.fsdp("fsdp_auto_wrap_policy") or "NO_WRAP").upper() == "NO_WRAP":
        why = "accelerate finds the layers to checkpoint by its wrap policy, and fails with NO_WRAP."
        return Problem(field, True, why, f"{fix} Use gradient_checkpointing: true.")
    return None


def optimizer_works_on_shards(run: Run) -> Problem | None:
    """Two gloo ranks, FSDP2: bitsandbytes' optimizers raise on DTensors in their first step ("got mixed torch.Tensor
    and DTensor", "does not have a sharding strategy registered"), and so does transformers' Adafactor."""
    name = str(run.get("optim"))
    if run.fsdp_version != 2 or name not in (*BITSANDBYTES_OPTIMIZERS, "adafactor"):
        return None
    return Problem(
        "optim", name,
        "Its kernels do not take the DTensors that FSDP2 makes of parameters: the first step raises.",
        "Set optim: adamw_torch_fused. Its states are sharded too; for adapters they are small.",
    )  # fmt: skip


def layerwise_optimizer_runs_alone(run: Run) -> Problem | None:
    """transformers/trainer_optimizer.py raises NotImplementedError for layer-wise optimizers in distributed runs."""
    name = str(run.get("optim"))
    if run.num_processes == 1 or not name.endswith("layerwise"):
        return None
    return Problem(
        "optim", name,
        "Layer-wise optimizers do not support distributed training; the Trainer raises.",
        "Set optim: adamw_torch_fused, or run one process.",
    )  # fmt: skip


def device_map_is_not_set(run: Run) -> Problem | None:
    """load_model places the model itself; accelerate refuses models with a device_map in any distributed mode."""
    kwargs = run.get("model_init_kwargs")
    if not isinstance(kwargs, dict) or "device_map" not in kwargs:
        return None
    return Problem(
        "model_init_kwargs.device_map", kwargs["device_map"],
        "A model spread over devices by transformers cannot be sharded; accelerate refuses to train it.",
        "Remove device_map; FSDP2 spreads the model.",
    )  # fmt: skip


def trainer_has_no_fsdp_of_its_own(run: Run) -> Problem | None:
    """TrainingArguments with `fsdp` builds a second FSDP plugin over the one of the accelerate config, after
    load_model has sharded the model by the first (training_args.py, _process_fsdp_args)."""
    if not run.get("fsdp"):
        return None
    return Problem(
        "fsdp", run.get("fsdp"),
        "The accelerate config says how to shard, and load_model has done it by then; this would say it again.",
        "Remove fsdp (and fsdp_config) from the recipe.",
    )  # fmt: skip


def packed_samples_stay_apart(run: Run) -> Problem | None:
    """SFTTrainer: only the bfd strategies give position ids per sample, from which transformers builds masks (checked
    against separate samples for sdpa and eager); 'wrapped' lets samples attend to each other. For running text that
    is what pretraining does; for questions and answers it is a mistake."""
    if not run.get("packing") or run.get("packing_strategy") != "wrapped":
        return None
    marks = [key for key in ("assistant_only_loss", "completion_only_loss", "dataset_format") if run.get(key)]
    if not marks:
        return None
    return Problem(
        "packing_strategy", "wrapped",
        f"Samples packed into one sequence attend to each other and are cut in the middle: answers ({marks[0]} is "
        "set) are learned from other samples' questions.",
        "Set packing_strategy: bfd, or packing: false.",
    )  # fmt: skip


def packing_has_a_length(run: Run) -> Problem | None:
    """SFTTrainer raises ValueError after the model is loaded."""
    if not run.get("packing") or run.get("max_length") is not None:
        return None
    return Problem(
        "max_length", None,
        "Packing needs the length of a packed sequence; the trainer raises after the model is loaded.",
        "Set max_length.",
    )  # fmt: skip


def best_model_can_be_loaded(run: Run) -> Problem | None:
    """Trainer.__init__ raises for save_only_model with load_best_model_at_end under FSDP."""
    if not run.fsdp_version or not (run.get("save_only_model") and run.get("load_best_model_at_end")):
        return None
    return Problem(
        "save_only_model", True,
        "The Trainer refuses it with load_best_model_at_end under FSDP, after the model is loaded.",
        "Set save_only_model: false.",
    )  # fmt: skip


def something_is_trained(run: Run) -> Problem | None:
    """recipes/sft.py refuses a recipe without an adapter."""
    if run.get("use_peft") or run.get("adapter_name_or_path"):
        return None
    return Problem(
        "use_peft", run.get("use_peft"),
        "Quantised weights are frozen, and without an adapter nothing would be trained.",
        "Set use_peft: true, or adapter_name_or_path to continue from a saved adapter.",
    )  # fmt: skip


def weights_have_a_row_format(run: Run) -> Problem | None:
    """quantization/bitsandbytes.py: LLM.int8 keeps outlier columns, which cannot be cut into rows."""
    if not run.get("load_in_8bit"):
        return None
    return Problem(
        "load_in_8bit", True,
        "LLM.int8 keeps outlier columns of the whole weight and cannot be sharded by rows; load_model refuses it.",
        "Set load_in_4bit: true.",
    )  # fmt: skip


def adapter_kind_is_supported(run: Run) -> Problem | None:
    """lora_config.py refuses target_parameters: bare parameters are not quantised and have no LoRA layer."""
    if not run.get("lora_target_parameters"):
        return None
    return Problem(
        "lora_target_parameters", run.get("lora_target_parameters"),
        "Bare parameters (fused experts) are not quantised and have no LoRA layer; load_model refuses them.",
        "Name linear layers in lora_target_modules.",
    )  # fmt: skip


def offload_has_fsdp(run: Run) -> Problem | None:
    """load_model refuses offload without FSDP (engine.py)."""
    if run.offload == "none" or run.fsdp_version is not None:
        return None
    return Problem(
        "offload", run.offload,
        "Only FSDP moves layers between host and GPU, also on one GPU; load_model refuses it otherwise.",
        "Use accelerate_configs/fsdp2_offload.yaml, or offload: none.",
    )  # fmt: skip


RULES: tuple[Rule, ...] = (
    distributed_type_is_supported, fsdp1_has_gpus, quant_storage_survives, dtype_agrees_with_mixed_precision,
    precision_agrees_with_the_rest,
    sync_module_states_is_on, reshard_after_forward_has_its_versions_type,
    state_dict_type_is_known_to_fsdp2, checkpointing_happens_once, optimizer_works_on_shards,
    layerwise_optimizer_runs_alone, device_map_is_not_set, trainer_has_no_fsdp_of_its_own, packed_samples_stay_apart,
    packing_has_a_length, best_model_can_be_loaded, something_is_trained, weights_have_a_row_format,
    adapter_kind_is_supported, offload_has_fsdp,
)  # fmt: skip
