"""The rules of `validate` about rotary training. One rule is one function: a `Run` in, a `Problem` or None out."""

from __future__ import annotations

from dataclasses import fields

from hf_fsdp_qlora.rotary_arguments import RotaryArguments
from hf_fsdp_qlora.validation import Problem, Rule, Run

OTHER_TRAINING = ("use_peft", "adapter_name_or_path", "train_new_layers", "loraplus_lr_ratio")
OTHER_FORMATS = ("load_in_4bit", "load_in_8bit", "int8_type", "hqq_nbits")


def rotary_keys_have_rotary_active(run: Run) -> Problem | None:
    """recipes/sft.py prepares rotary training only where rotary_active is set."""
    others = [f.name for f in fields(RotaryArguments) if f.name != "rotary_active" and f.name in run.recipe]
    if not others or run.recipe.get("rotary_active"):
        return None
    return Problem(
        others[0], run.recipe[others[0]], "It has no effect without rotary_active.",
        f"Set rotary_active (10%), or remove {others[0]}.",
    )  # fmt: skip


def rotary_trains_alone(run: Run) -> Problem | None:
    """load_model refuses an adapter beside rotary training, and takes the format from it."""
    if not run.recipe.get("rotary_active"):
        return None
    for key in OTHER_TRAINING:
        if run.recipe.get(key):
            return Problem(
                key, run.recipe[key],
                "rotary_active trains the weights themselves, and an adapter over them would go by weights that "
                "change.",
                f"Remove {key}, or rotary_active.",
            )  # fmt: skip
    for key in OTHER_FORMATS:
        if run.recipe.get(key):
            return Problem(
                key, run.recipe[key], "rotary_frozen says in which format parked blocks are.",
                f"Remove {key}, and set rotary_frozen (int8, nf4 or bf16).",
            )  # fmt: skip
    return None


def rotary_has_an_engine(run: Run) -> Problem | None:
    """rotary/prepare.py: an FSDP1 flat parameter cannot be taken apart, and offload has nothing to do."""
    if not run.recipe.get("rotary_active"):
        return None
    if run.fsdp_version == 1:
        return Problem(
            "fsdp_config.fsdp_version", run.fsdp("fsdp_version"),
            "Rotary training needs parameters that come and go; FSDP1's flat parameters cannot be taken apart.",
            "Set fsdp_version: 2, or use DDP.",
        )  # fmt: skip
    if run.offload != "none":
        return Problem(
            "offload", run.offload,
            "What is parked has its weights on the host already, and what is active must be on the device.",
            "Set offload: none (and fsdp_offload_params: false).",
        )  # fmt: skip
    return None


def rotary_is_not_compiled(run: Run) -> Problem | None:
    """A layer's code path changes when it is activated; each rotation would compile again (loading.py refuses it)."""
    if not (run.recipe.get("rotary_active") and run.recipe.get("compile_layers")):
        return None
    why = "Blocks that come and go would be compiled again at every rotation."
    return Problem("compile_layers", True, why, "Remove compile_layers.")


ROTARY_RULES: tuple[Rule, ...] = (
    rotary_keys_have_rotary_active, rotary_trains_alone, rotary_has_an_engine, rotary_is_not_compiled,
)  # fmt: skip
