"""Pairs of accelerate config and recipe, rule by rule: some that trip the rule, some that do not."""

from __future__ import annotations

from typing import Any

FSDP2: dict[str, Any] = dict(
    distributed_type="FSDP", num_processes=2, num_machines=1, mixed_precision="bf16",
    fsdp_config=dict(fsdp_version=2, fsdp_auto_wrap_policy="NO_WRAP", fsdp_state_dict_type="FULL_STATE_DICT",
                     fsdp_reshard_after_forward=True, fsdp_activation_checkpointing=False),
)  # fmt: skip
RECIPE: dict[str, Any] = dict(use_peft=True, load_in_4bit=True, dtype="bfloat16", bf16=True, max_length=512)
ROTARY: dict[str, Any] = dict(rotary_active="10%", dtype="bfloat16", bf16=True, max_length=512)
DDP: dict[str, Any] = dict(distributed_type="MULTI_GPU", num_processes=2)
SINGLE: dict[str, Any] = dict(distributed_type="NO", num_processes=1)


def fsdp2(**fsdp_config: Any) -> dict[str, Any]:
    return {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], **fsdp_config}}


def fsdp1(**fsdp_config: Any) -> dict[str, Any]:
    values = dict(fsdp_version=1, fsdp_reshard_after_forward="FULL_SHARD", fsdp_sync_module_states=True,
                  fsdp_cpu_ram_efficient_loading=True)  # fmt: skip
    return fsdp2(**{**values, **fsdp_config})


def wrapping(name: str) -> dict[str, Any]:
    return fsdp2(fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP", fsdp_transformer_layer_cls_to_wrap=name)


def hsdp(replicas: int, shards: int, *, tp: int = 1, num_processes: int = 4, num_machines: int = 1) -> dict[str, Any]:
    names = dict(dp_replicate=replicas, dp_shard=shards, tp=tp)
    sizes = {f"parallelism_config_{name}_size": size for name, size in names.items()}
    return {**FSDP2, "num_processes": num_processes, "num_machines": num_machines, "parallelism_config": sizes}


def recipe(**values: Any) -> dict[str, Any]:
    return {**RECIPE, **values}


# rule -> pairs that trip it, pairs that do not (beside the plain FSDP2 pair, which trips nothing)
CASES: dict[str, tuple[list[tuple[dict, dict]], list[tuple[dict, dict]]]] = {
    "distributed_type_is_supported": (
        [({"distributed_type": "DEEPSPEED"}, RECIPE), ({"distributed_type": "MULTI_CPU"}, RECIPE)],
        [({"distributed_type": False}, RECIPE), ({"distributed_type": "MULTI_GPU"}, RECIPE)],
    ),
    "fsdp1_has_gpus": (
        [({**fsdp1(), "use_cpu": True}, RECIPE), ({**FSDP2, "fsdp_config": {}, "use_cpu": True}, RECIPE)],
        [(fsdp1(), RECIPE), ({**FSDP2, "use_cpu": True}, RECIPE), (SINGLE, RECIPE)],
    ),
    "precision_agrees_with_the_rest": (
        [(FSDP2, recipe(precision="fp16")), (FSDP2, recipe(precision="fp32", dtype="float32", bf16=True)),
         (FSDP2, recipe(precision="fp32_autocast")), (FSDP2, recipe(bf16=False, fp16=True, dtype="float16"))],
        [(FSDP2, recipe(precision="bf16")), (fsdp1(), recipe(precision="fp32", dtype="float32", bf16=False)),
         (FSDP2, {**recipe(precision="fp32_autocast"), "dtype": "auto"})],
    ),
    "quant_storage_survives": (
        [(FSDP2, recipe(bnb_4bit_quant_storage="bfloat16")), (fsdp1(), recipe(bnb_4bit_quant_storage="float32"))],
        [(FSDP2, recipe(bnb_4bit_quant_storage="float32")), (fsdp1(), recipe(bnb_4bit_quant_storage="bfloat16")),
         (SINGLE, recipe(bnb_4bit_quant_storage="bfloat16"))],
    ),
    "dtype_agrees_with_mixed_precision": (
        [(FSDP2, recipe(dtype="float32")), (FSDP2, {k: v for k, v in RECIPE.items() if k not in ("dtype", "bf16")}),
         (FSDP2, recipe(bf16=False, fp16=True))],
        [(FSDP2, recipe(dtype="float32", bf16=False)), (SINGLE, recipe(dtype="float32"))],
    ),
    "sync_module_states_is_on": (
        [(fsdp1(fsdp_sync_module_states=False, fsdp_cpu_ram_efficient_loading=False), RECIPE)],
        [(fsdp1(), RECIPE), (fsdp1(fsdp_sync_module_states=False), RECIPE), (FSDP2, RECIPE)],
    ),
    "reshard_after_forward_has_its_versions_type": (
        [(fsdp2(fsdp_reshard_after_forward="FULL_SHARD"), RECIPE), (fsdp1(fsdp_reshard_after_forward=True), RECIPE)],
        [(fsdp2(fsdp_reshard_after_forward="false"), RECIPE), (fsdp1(), RECIPE)],
    ),
    "state_dict_type_is_known_to_fsdp2": (
        [(fsdp2(fsdp_state_dict_type="LOCAL_STATE_DICT"), RECIPE)],
        [(fsdp2(fsdp_state_dict_type="SHARDED_STATE_DICT"), RECIPE)],
    ),
    "fsdp1_state_dict_is_full": (
        [(fsdp1(fsdp_state_dict_type="SHARDED_STATE_DICT"), RECIPE)],
        [(fsdp1(), RECIPE), (fsdp2(fsdp_state_dict_type="SHARDED_STATE_DICT"), RECIPE)],
    ),
    "replicas_fit_the_processes": (
        [(hsdp(2, 2, num_processes=8), RECIPE), (hsdp(4, 1), RECIPE), (hsdp(1, 4, tp=2), RECIPE),
         (hsdp(2, 6, num_processes=12, num_machines=3), RECIPE), ({**hsdp(2, 2), **fsdp1()}, RECIPE),
         ({**FSDP2, "parallelism_config": {"dp_replicate_size": 2}}, RECIPE)],
        [(hsdp(2, 2, num_machines=2), RECIPE), (hsdp(2, 4, num_processes=8, num_machines=4), RECIPE),
         ({**FSDP2, "parallelism_config": {}}, RECIPE)],
    ),
    "checkpointing_suits_ddp": (
        [(DDP, recipe(gradient_checkpointing_kwargs={"use_reentrant": True}))],
        [(DDP, recipe(gradient_checkpointing_kwargs={"use_reentrant": False})),
         (FSDP2, recipe(gradient_checkpointing_kwargs={"use_reentrant": True})),
         (DDP, recipe(gradient_checkpointing=False, gradient_checkpointing_kwargs={"use_reentrant": True}))],
    ),
    "adapter_is_saved_once": (
        [({**FSDP2, "num_machines": 2}, recipe(save_on_each_node=True))],
        [(FSDP2, recipe(save_on_each_node=True)), ({**FSDP2, "num_machines": 2}, RECIPE)],
    ),
    "checkpointing_happens_once": (
        [(fsdp2(fsdp_activation_checkpointing=True), RECIPE),
         (fsdp2(fsdp_activation_checkpointing=True), recipe(gradient_checkpointing=False))],
        [(fsdp2(fsdp_activation_checkpointing="false"), RECIPE)],
    ),
    "optimizer_works_on_shards": (
        [(FSDP2, recipe(optim="paged_adamw_8bit")), (FSDP2, recipe(optim="adafactor")),
         (fsdp1(), recipe(optim="adamw_8bit")), (fsdp1(), recipe(optim="adafactor"))],
        [(SINGLE, recipe(optim="paged_adamw_8bit")), (FSDP2, recipe(optim="sgd")), (fsdp1(), RECIPE),
         (FSDP2, {**ROTARY, "optim": "adamw_8bit"}),
         (fsdp1(), recipe(optim="adamw_8bit", save_only_model=True)),
         (fsdp1(), recipe(optim="paged_adamw_8bit", save_strategy="no"))],
    ),
    "whole_parameters_have_fsdp2": (
        [(fsdp1(), recipe(replicate_head=True)), (SINGLE, recipe(embedding_on_host=True)),
         (FSDP2, {**ROTARY, "embedding_on_host": True})],
        [(FSDP2, recipe(replicate_head=True, embedding_on_host=True)), (DDP, recipe(replicate_head=True)),
         (fsdp1(), RECIPE)],
    ),
    "activation_offloading_has_an_accelerator": (
        [({**FSDP2, "use_cpu": True}, recipe(activation_offloading=True))],
        [(FSDP2, recipe(activation_offloading=True)), ({**FSDP2, "use_cpu": True}, RECIPE)],
    ),
    "one_format_is_chosen": (
        [(FSDP2, recipe(int8_type="linear")), (FSDP2, recipe(hqq_nbits=3)), (FSDP2, recipe(hqq_group_size=64)),
         (FSDP2, {**recipe(int8_type="dynamic", hqq_nbits=4), "load_in_4bit": False})],
        [(FSDP2, {**recipe(int8_type="linear", int8_block_size=64), "load_in_4bit": False}),
         (FSDP2, {**recipe(hqq_nbits=3, hqq_axis=0), "load_in_4bit": False})],
    ),
    "layerwise_optimizer_runs_alone": (
        [(FSDP2, recipe(optim="galore_adamw_layerwise"))],
        [(SINGLE, recipe(optim="galore_adamw_layerwise"))],
    ),
    "device_map_is_not_set": (
        [(FSDP2, recipe(model_init_kwargs={"device_map": "auto"}))],
        [(FSDP2, recipe(model_init_kwargs={"use_cache": False}))],
    ),
    "trainer_has_no_fsdp_of_its_own": ([(FSDP2, recipe(fsdp="full_shard"))], [(FSDP2, recipe(fsdp=None))]),
    "packed_samples_stay_apart": (
        [(FSDP2, recipe(packing=True, packing_strategy="wrapped", assistant_only_loss=True))],
        [(FSDP2, recipe(packing=True, packing_strategy="wrapped")), (FSDP2, recipe(packing=True)),
         (FSDP2, recipe(packing_strategy="wrapped", assistant_only_loss=True))],
    ),
    "packing_has_a_length": (
        [(FSDP2, recipe(packing=True, max_length=None))],
        [(FSDP2, recipe(max_length=None))],
    ),
    "best_model_can_be_loaded": (
        [(FSDP2, recipe(save_only_model=True, load_best_model_at_end=True))],
        [(SINGLE, recipe(save_only_model=True, load_best_model_at_end=True)), (FSDP2, recipe(save_only_model=True))],
    ),
    "something_is_trained": (
        [(FSDP2, recipe(use_peft=False))],
        [(FSDP2, recipe(use_peft=False, adapter_name_or_path="x")), (FSDP2, ROTARY)],
    ),
    "rotary_keys_have_rotary_active": (
        [(FSDP2, recipe(rotary_frozen="nf4"))], [(FSDP2, {**ROTARY, "rotary_frozen": "nf4"})],
    ),
    "rotary_trains_alone": (
        [(FSDP2, recipe(rotary_active="2")), (SINGLE, {**ROTARY, "load_in_4bit": True}),
         (SINGLE, {**ROTARY, "loraplus_lr_ratio": 16.0})],
        [(FSDP2, ROTARY), (DDP, {**ROTARY, "rotary_frozen": "nf4", "optim": "adamw_8bit"})],
    ),
    "rotary_has_an_engine": (
        [(fsdp1(), ROTARY), (fsdp2(fsdp_offload_params=True), ROTARY), (FSDP2, {**ROTARY, "offload": "base"})],
        [(FSDP2, ROTARY), (DDP, ROTARY), (SINGLE, ROTARY), (fsdp1(), RECIPE)],
    ),
    "rotary_is_not_compiled": (
        [(SINGLE, {**ROTARY, "compile_layers": True})],
        [(SINGLE, recipe(compile_layers=True)), (SINGLE, {**ROTARY, "compile_layers": False})],
    ),
    "weights_have_a_row_format": ([(FSDP2, recipe(load_in_8bit=True))], []),
    "adapter_kind_is_supported": (
        [(FSDP2, recipe(lora_target_parameters=["experts.w"]))],
        [(FSDP2, recipe(use_dora=True))],
    ),
    "offload_has_fsdp": (
        [(SINGLE, recipe(offload="base")), ({**fsdp1(), "use_cpu": True}, recipe(offload="all"))],
        [(FSDP2, recipe(offload="base")), (fsdp2(fsdp_offload_params=True), RECIPE)],
    ),
    "wrapped_classes_exist": (
        [(wrapping("GPT2Block"), RECIPE)],
        [(wrapping("LlamaDecoderLayer"), RECIPE), (fsdp2(fsdp_transformer_layer_cls_to_wrap="GPT2Block"), RECIPE)],
    ),
    "targets_match": (
        [(FSDP2, recipe(lora_target_modules=["q_proj", "query"])), (FSDP2, recipe(lora_target_modules="query"))],
        [(FSDP2, recipe(lora_target_modules=["q_proj"])), (FSDP2, recipe(lora_target_modules=r".*mlp\..*_proj")),
         (FSDP2, recipe(lora_target_modules="all-linear")), (FSDP2, recipe(lora_target_modules=["all-linear"]))],
    ),
    "layers_are_compiled_outside_fsdp": (
        [(FSDP2, recipe(compile_layers=True)), (fsdp1(), recipe(compile_layers=True, activation_budget=0.0))],
        [(SINGLE, recipe(compile_layers=True)), (DDP, recipe(compile_layers=True)), (FSDP2, RECIPE)],
    ),
    "activation_budget_has_its_companions": (
        [(SINGLE, recipe(activation_budget=0.5)), (SINGLE, recipe(activation_budget=2.0, compile_layers=True)),
         (SINGLE, recipe(activation_budget=0.5, compile_layers=True, checkpoint_layers=2)),
         (SINGLE, recipe(activation_budget=0.5, compile_layers=True, lora_dropout=0.1)),
         (SINGLE, recipe(activation_budget=0.5, compile_layers=True))],  # upstream's lora_dropout is 0.05
        [(SINGLE, recipe(activation_budget=0.5, compile_layers=True, lora_dropout=0.0)),
         (SINGLE, recipe(activation_budget=1.0, compile_layers=True)), (SINGLE, recipe(checkpoint_layers=2))],
    ),
    "whole_parameters_are_frozen": (
        [(FSDP2, recipe(replicate_head=True, lora_modules_to_save=["lm_head"])),
         (FSDP2, recipe(replicate_head=True, lora_modules_to_save=["model.norm"])),
         (FSDP2, recipe(embedding_on_host=True, lora_modules_to_save=["embed_tokens"]))],
        [(FSDP2, recipe(replicate_head=True, embedding_on_host=True)),
         (FSDP2, recipe(replicate_head=True, lora_modules_to_save=["embed_tokens"]))],
    ),
    "sequences_fit_the_model": (
        [(FSDP2, recipe(max_length=8192))],
        [(FSDP2, recipe(max_length=4096))],
    ),
    "memory_fits": (
        [(FSDP2, recipe(per_device_train_batch_size=64, max_length=4096))],
        [(FSDP2, recipe(per_device_train_batch_size=1))],
    ),
}  # fmt: skip
