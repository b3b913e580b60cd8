"""The rules that look at the launcher and at `load_model`'s own arguments alone: `validate` and `load_model` both
apply them, the latter to what `accelerate launch` put into the environment.

Rests on what validation_rules.py says there.
"""

from __future__ import annotations

from types import SimpleNamespace

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.validation import Problem, Rule, Run, is_true

ENGINES = ("NO", "MULTI_GPU", "FSDP")


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


def quant_storage_survives(run: Run) -> Problem | None:
    """FSDP2 copies shards in their dtype and rewrites NaN patterns of 16-bit ones (pytorch/pytorch#159333); FSDP1's
    flat parameters have one dtype, which mixed precision casts."""
    storage = run.get("bnb_4bit_quant_storage")
    if not run.get("load_in_4bit") or storage in (None, "uint8"):
        return None
    name = str(storage).removeprefix("torch.")
    import torch

    from hf_fsdp_qlora.engine import resolve_storage_dtype

    config = SimpleNamespace(bnb_4bit_quant_storage=getattr(torch, name))
    try:
        resolve_storage_dtype(config, run.engine, getattr(torch, run.dtype or "bfloat16"))
    except ConfigError as error:
        return Problem(
            "bnb_4bit_quant_storage", name, str(error), "Leave it out; the storage is chosen for the engine."
        )
    return None


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


def weights_have_a_row_format(run: Run) -> Problem | None:
    """quantization/bitsandbytes.py: LLM.int8 keeps outlier columns, which cannot be cut into rows."""
    if not run.get("load_in_8bit"):
        return None
    return Problem(
        "load_in_8bit", True,
        "LLM.int8 keeps outlier columns of the whole weight and cannot be sharded by rows; load_model refuses it.",
        "Set int8_type: linear (8-bit rows; LinearInt8Config in Python), or load_in_4bit: true.",
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
    """What load_model refuses (engine.py): only FSDP moves layers between host and GPU, and FSDP1 must pin them."""
    if run.offload == "none":
        return None
    import torch

    from hf_fsdp_qlora.engine import check_offload, resolve_offload

    device = torch.device("cpu" if is_true(run.accelerate.get("use_cpu")) else "cuda")
    try:
        check_offload(resolve_offload(run.offload), run.engine, device, pin_memory=run.get("offload_pin_memory"))
    except ConfigError as error:
        fix = "Use accelerate_configs/fsdp2_offload.yaml, or offload: none."
        return Problem("offload", run.offload, str(error), fix)
    return None


def whole_parameters_have_fsdp2(run: Run) -> Problem | None:
    """outside.py: FSDP2 alone can leave parameters out, and rotary training replicates everything but rows already."""
    set_ones = [key for key in ("replicate_head", "embedding_on_host") if run.get(key)]
    if run.engine not in ("fsdp1", "fsdp2"):
        set_ones = [key for key in set_ones if key == "embedding_on_host"]  # a head is whole there
    rotary = bool(run.recipe.get("rotary_active"))
    if not set_ones or (run.engine == "fsdp2" and not rotary):
        return None
    return Problem(
        set_ones[0], True,
        "Rotary training keeps everything but quantised rows whole on every rank." if rotary
        else "Only FSDP2 can leave single parameters out of what it shards.",
        f"Remove {' and '.join(set_ones)}, or use accelerate_configs/fsdp2.yaml.",
    )  # fmt: skip


def fsdp1_state_dict_is_full(run: Run) -> Problem | None:
    """The trainer refuses it once the model is loaded (trainer_compat/patches.py); FULL is FSDP1's default."""
    value = str(run.fsdp("fsdp_state_dict_type") or "FULL_STATE_DICT").upper()
    if run.fsdp_version != 1 or value in ("FULL_STATE_DICT", "1"):
        return None
    return Problem(
        "fsdp_config.fsdp_state_dict_type", value,
        "An optimizer state that FSDP1 wrote in shards cannot be resumed by another engine; the trainer refuses it.",
        "Set fsdp_state_dict_type: FULL_STATE_DICT; only adapters and their optimizer states are gathered.",
    )  # fmt: skip


def replicas_fit_the_processes(run: Run) -> Problem | None:
    """Accelerator raises if the sizes do not multiply to the number of processes, or if FSDP2 has no dimension to
    shard over (accelerate/parallelism_config.py); `accelerate launch` drops keys without the prefix, unread."""
    sizes = dict(run.accelerate.get("parallelism_config") or {})
    if not sizes:
        return None
    prefix = "parallelism_config_"
    replicas, shards, *others = (
        int(sizes.get(f"{prefix}{name}_size", 1)) for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    )
    per_node = run.num_processes // int(run.accelerate.get("num_machines") or 1)
    unread = [key for key in sizes if not key.startswith(prefix)]
    why = ""
    if unread:
        why = f"accelerate launch does not read {', '.join(unread)}: every key must begin with {prefix}."
    elif run.fsdp_version != 2:
        why = "Only FSDP2 replicates shards; with anything else accelerate raises or ignores it."
    elif max(others) > 1:
        why = "Tensor, context and sequence parallelism are not supported: load_model splits rows over dp_shard only."
    elif replicas * shards != run.num_processes:
        why = f"{replicas} replicas of {shards} ranks are not {run.num_processes} processes; accelerate raises."
    elif shards == 1:
        why = "Replicas of one rank are not sharded at all, and FSDP2 has nothing to do; accelerate raises."
    elif per_node % shards and shards % per_node:
        why = f"Replicas of {shards} ranks straddle nodes of {per_node}: some layers are gathered over the network."
    if not why:
        return None
    return Problem(
        "parallelism_config", sizes, why,
        f"Set {prefix}dp_replicate_size to the number of nodes and {prefix}dp_shard_size to the GPUs of one, as "
        "accelerate_configs/multi_node.yaml does, or leave parallelism_config out.",
    )  # fmt: skip


LAUNCH_RULES: tuple[Rule, ...] = (
    distributed_type_is_supported, quant_storage_survives, precision_agrees_with_the_rest,
    reshard_after_forward_has_its_versions_type, state_dict_type_is_known_to_fsdp2, fsdp1_state_dict_is_full,
    replicas_fit_the_processes,
    device_map_is_not_set, weights_have_a_row_format, adapter_kind_is_supported, offload_has_fsdp,
    whole_parameters_have_fsdp2,
)  # fmt: skip
