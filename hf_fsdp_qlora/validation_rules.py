"""The rules of `validate` that need the trainer's settings but no model. One rule is one function: a `Run` in, a
`Problem` or None out.

Every rule rests on something that was read in the installed sources or seen to happen (transformers 5.23, accelerate
1.15, trl 1.16, peft 0.21, bitsandbytes 0.50); its docstring says which.
"""

from __future__ import annotations

from hf_fsdp_qlora.validation import Problem, Rule, Run, is_true
from hf_fsdp_qlora.validation_launch_rules import LAUNCH_RULES
from hf_fsdp_qlora.validation_rotary_rules import ROTARY_RULES

BITSANDBYTES_OPTIMIZERS = (
    "adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit",
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


def checkpointing_suits_ddp(run: Run) -> Problem | None:
    """Two gloo ranks: with use_reentrant=True the first backward under DDP raises ("Expected to mark a variable ready
    only once"); under FSDP1 and FSDP2 losses and gradients are those of use_reentrant=False."""
    kwargs = run.get("gradient_checkpointing_kwargs")
    reentrant = isinstance(kwargs, dict) and is_true(kwargs.get("use_reentrant"))
    if run.engine != "ddp" or not run.get("gradient_checkpointing") or not reentrant:
        return None
    return Problem(
        "gradient_checkpointing_kwargs", kwargs,
        "Reentrant checkpointing runs a backward inside the backward, and DDP sees gradients of adapters twice: the "
        "first step raises.",
        "Leave it out, or set use_reentrant: false.",
    )  # fmt: skip


def adapter_is_saved_once(run: Run) -> Problem | None:
    """Adapters are gathered on rank 0 alone; the first rank of every other node would write an empty one."""
    nodes = int(run.accelerate.get("num_machines") or 1)
    if nodes == 1 or not run.get("save_on_each_node"):
        return None
    return Problem(
        "save_on_each_node", True,
        "Adapters are gathered on the first rank; the other nodes would write empty ones.",
        "Set save_on_each_node: false and an output_dir that all nodes share, or copy it when the run is over.",
    )  # fmt: skip


def optimizer_works_on_shards(run: Run) -> Problem | None:
    """Two gloo ranks, FSDP2: bitsandbytes' optimizers raise on DTensors in their first step ("got mixed torch.Tensor
    and DTensor", "does not have a sharding strategy registered"), and so does transformers' Adafactor.

    FSDP1: bitsandbytes' optimizers train, but nest their state under one key (`Optimizer8bit.state_dict`), so that
    FSDP saves rank 0's part as everybody's, and raises with use_orig_params. Adafactor trains as another algorithm,
    since a flat shard has no rows and columns to factor, and its RMS differs between the ranks."""
    if run.get("rotary_active"):  # its optimizer never sees a DTensor (rotary/optimizer.py)
        return None
    name, fix = _word(run.get("optim")), "Set optim: adamw_torch_fused. Its states are sharded; for adapters small."
    if run.fsdp_version == 2 and name in (*BITSANDBYTES_OPTIMIZERS, "adafactor"):
        why = "Its kernels do not take the DTensors that FSDP2 makes of parameters: the first step raises."
        return Problem("optim", name, why, fix)
    if run.fsdp_version == 1 and name == "adafactor":
        why = "It factors matrices; under FSDP1 parameters are flat shards, each scaled by one rank's part alone."
        return Problem("optim", name, why, fix)
    saved = _word(run.get("save_strategy")) != "no" and not run.get("save_only_model")
    if run.fsdp_version == 1 and name in BITSANDBYTES_OPTIMIZERS and saved:
        why = "It trains under FSDP1, but its state cannot be saved: rank 0's part would be written for all ranks."
        return Problem("optim", name, why, f"{fix} Or set save_only_model: true and do without resuming.")
    return None


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
    """recipes/sft.py refuses a recipe without an adapter or rotary training."""
    if run.get("use_peft") or run.get("adapter_name_or_path") or run.get("rotary_active"):
        return None
    return Problem(
        "use_peft", run.get("use_peft"),
        "Quantised weights are frozen, and without an adapter nothing would be trained.",
        "Set use_peft: true, or adapter_name_or_path to continue from a saved adapter, or rotary_active to train the "
        "weights themselves.",
    )  # fmt: skip


def activation_offloading_has_an_accelerator(run: Run) -> Problem | None:
    """TRL's OffloadActivations asks torch for the current accelerator's type and fails on None (AttributeError)."""
    if not run.get("activation_offloading") or not is_true(run.accelerate.get("use_cpu")):
        return None
    return Problem(
        "activation_offloading", True,
        "On the CPU activations are in host memory already; TRL asks for an accelerator and fails.",
        "Remove activation_offloading.",
    )  # fmt: skip


def one_format_is_chosen(run: Run) -> Problem | None:
    """train.py builds one quantisation config; a companion of another format would have no effect."""
    chosen = [key for key in ("load_in_4bit", "load_in_8bit", "int8_type", "hqq_nbits") if run.get(key)]
    if len(chosen) > 1:
        return Problem(
            chosen[1], run.get(chosen[1]), f"{chosen[0]} is set too, and weights have one format.",
            f"Remove {' or '.join(chosen)}.",
        )  # fmt: skip
    owners = {"int8_block_size": "int8_type", "hqq_group_size": "hqq_nbits", "hqq_axis": "hqq_nbits"}
    for key, owner in owners.items():
        if key in run.recipe and not run.get(owner):
            why = f"It has no effect without {owner}."
            return Problem(key, run.recipe[key], why, f"Set {owner}, or remove {key}.")
    return None


def layers_are_compiled_outside_fsdp(run: Run) -> Problem | None:
    """FSDP's hooks inside the decoder layers break every graph (layer_options.py refuses it)."""
    if run.distributed_type != "FSDP" or not run.recipe.get("compile_layers"):
        return None
    return Problem(
        "compile_layers", True,
        "FSDP's hooks inside the decoder layers break every compiled graph; load_model refuses it.",
        "Remove compile_layers and activation_budget, or train on one GPU or under DDP.",
    )  # fmt: skip


def activation_budget_has_its_companions(run: Run) -> Problem | None:
    """The compiler keeps to the budget, in place of checkpointing (layer_options.py refuses the rest)."""
    budget = run.recipe.get("activation_budget")
    if budget is None:
        return None
    if not 0 <= budget <= 1:
        return Problem("activation_budget", budget, "It is a share of a layer's activations.", "Use 0 to 1.")
    if not run.recipe.get("compile_layers"):
        why = "Only compiled layers recompute to a budget."
        return Problem("activation_budget", budget, why, "Set compile_layers: true, or use checkpoint_layers.")
    if run.recipe.get("checkpoint_layers") is not None:
        why = "checkpoint_layers says what is recomputed, too."
        return Problem("activation_budget", budget, why, "Remove activation_budget or checkpoint_layers.")
    if budget < 1 and run.get("use_peft") and run.get("lora_dropout"):
        why = f"With lora_dropout={run.get('lora_dropout')} what is computed again would drop other values."
        return Problem("activation_budget", budget, why, "Set lora_dropout: 0.0, or activation_budget: 1.")
    return None


TRAINER_RULES: tuple[Rule, ...] = (checkpointing_suits_ddp, adapter_is_saved_once, optimizer_works_on_shards)
"""What a stock trainer neither refuses by itself nor survives: checked again when it is built (trainer_compat)."""

RULES: tuple[Rule, ...] = (
    *LAUNCH_RULES, fsdp1_has_gpus, dtype_agrees_with_mixed_precision, sync_module_states_is_on,
    checkpointing_happens_once, *TRAINER_RULES, activation_offloading_has_an_accelerator, one_format_is_chosen,
    layerwise_optimizer_runs_alone, trainer_has_no_fsdp_of_its_own, packed_samples_stay_apart, packing_has_a_length,
    best_model_can_be_loaded, something_is_trained, layers_are_compiled_outside_fsdp,
    activation_budget_has_its_companions, *ROTARY_RULES,
)  # fmt: skip


def _word(value: object) -> str:
    """A key's word; the trainer's arguments hold some as members of an enum."""
    return str(getattr(value, "value", value))
