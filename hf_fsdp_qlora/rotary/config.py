"""What a rotary run can be told, checked as a whole when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.quantization import DenseConfig, LinearInt8Config

Order = Literal["random", "sequential", "reverse", "importance"]
Split = Literal["layer", "attention_mlp"]

ALWAYS_ACTIVE_KINDS = ("embedding", "head", "norm")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "split": ("layer", "attention_mlp"),
    "order": ("random", "sequential", "reverse", "importance"),
    "frozen": ("int8", "nf4", "bf16"),
    "master_dtype": ("float32", "bfloat16"),
    "moments": ("reset", "keep"),
    "keep_bits": (32, 8),
}


@dataclass(frozen=True)
class ActiveLimit:
    """How much is active at a time; exactly one is set.

    Args:
        blocks: number of rotating blocks, those that are always active aside.
        fraction: of all parameters, those that are always active included.
        num_bytes: on the device, of everything that active parameters have and parked ones lack.
    """

    blocks: int | None = None
    fraction: float | None = None
    num_bytes: int | None = None


@dataclass(frozen=True)
class RotaryConfig:
    """Settings of rotary training.

    Args:
        active: what trains at a time: a number of blocks (2), a share of the parameters ("10%"), or device memory
            for weights, gradients, masters and moments of the active blocks ("2GiB"). At least one block is active.
        steps_per_block: optimizer steps of a visit.
        split: "layer" trains a decoder layer as one block, "attention_mlp" its two halves apart.
        order: "random" without replacement in each sweep over the blocks; "sequential" from the embedding up;
            "reverse"; "importance" draws blocks in proportion to a moving average of their gradient norms.
        always_active: of "embedding", "head" and "norm" (the final one), those that do not rotate but train in every
            step. An embedding that is always active costs its share of memory and the whole backward pass; the norm
            costs nothing, and a visit of it alone would be wasted.
        seed: of the order, and of stochastic rounding.
        frozen: the format of parked linear layers; "bf16" means unquantised, in the model's dtype, in rows too.
        master_dtype: of the durable weights on the host; "bfloat16" rounds stochastically.
        moments: optimizer state of a block that is parked: "reset" drops it, "keep" brings it back at the next visit.
        keep_bits: of kept moments, 32 or 8 (blockwise).
        warmup_steps: over which the learning rate rises from 0 to the schedule's at the start of each visit.
        coverage_floor: under "importance", the share of the average number of visits below which no block falls.
        eval_masters: evaluate twice, on the device's model with its quantised blocks (`eval_*`) and on the masters
            (`eval_masters_*`), which are what is saved.

    Raises:
        ConfigError: a value cannot be; all such values are listed.
    """

    active: int | str = "10%"
    steps_per_block: int = 50
    split: Split = "layer"
    order: Order = "random"
    always_active: tuple[str, ...] = ("norm",)
    seed: int = 0
    frozen: Literal["int8", "nf4", "bf16"] = "int8"
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    moments: Literal["reset", "keep"] = "reset"
    keep_bits: Literal[32, 8] = 32
    warmup_steps: int = 0
    coverage_floor: float = 0.5
    eval_masters: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "always_active", tuple(self.always_active))  # YAML has lists
        problems = [
            f"{name}={getattr(self, name)!r} is none of {', '.join(map(repr, choices))}"
            for name, choices in _CHOICES.items()
            if getattr(self, name) not in choices
        ]
        problems += [problem for problem in (_active_problem(self), *_number_problems(self)) if problem]
        if problems:
            raise ConfigError("RotaryConfig: " + "; ".join(problems) + ".")

    @property
    def limit(self) -> ActiveLimit:
        """`active`, read."""
        return parse_active(self.active)

    @property
    def frozen_format(self) -> Any:
        """The `quantization_config` to load the model with."""
        if self.frozen == "int8":
            return LinearInt8Config()
        if self.frozen == "nf4":
            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        return DenseConfig()

    @property
    def torch_master_dtype(self) -> torch.dtype:
        """`master_dtype`, as torch's."""
        return torch.float32 if self.master_dtype == "float32" else torch.bfloat16


def parse_active(active: int | str) -> ActiveLimit:
    """Read `RotaryConfig.active`.

    Raises:
        ConfigError: it is neither a positive count, nor a percentage up to 100, nor a size in KiB, MiB, GiB or TiB.
    """
    text = str(active).replace(" ", "")
    if re.fullmatch(r"\d+", text) and int(text):
        return ActiveLimit(blocks=int(text))
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%|[KMGT]iB)", text)
    if match is not None and (number := float(match[1])) > 0:
        if match[2] != "%":
            return ActiveLimit(num_bytes=int(number * _UNITS[match[2]]))
        if number <= 100:
            return ActiveLimit(fraction=number / 100)
    raise ConfigError(
        f"active={active!r} is no number of blocks (2), share of the parameters up to 100 % ('10%') or size ('2GiB')"
    )


def check_load(
    peft_config: Any, adapter_name_or_path: Any, *, engine: str, offload: str, compile_layers: bool
) -> None:
    """Refuse, before anything is loaded, what a rotary run cannot go on from.

    Raises:
        ConfigError: an adapter, FSDP1, offload, or layers that would be compiled again at every rotation.
    """
    if engine == "fsdp1":
        raise ConfigError(
            "Rotary training does not work under FSDP1, whose flat parameters cannot be taken apart. Use FSDP2 "
            "(accelerate_configs/fsdp2.yaml) or DDP."
        )
    if offload != "none":
        raise ConfigError(
            f"offload={offload!r} with rotary training: what is parked has its weights on the host already, and what "
            "is active must be on the device. Leave offload (fsdp_offload_params) out."
        )
    if compile_layers:
        raise ConfigError("compile_layers with rotary: blocks that come and go would be compiled again. Leave it out.")
    if peft_config is not None or adapter_name_or_path is not None:
        raise ConfigError(
            "Rotary training trains the weights themselves, and an adapter over them would be trained against weights "
            "that change. Leave out rotary, or peft_config and adapter_name_or_path (use_peft: false)."
        )


def _active_problem(config: RotaryConfig) -> str | None:
    try:
        parse_active(config.active)
    except ConfigError as error:
        return str(error)
    return None


def _number_problems(config: RotaryConfig) -> list[str]:
    problems = []
    if config.steps_per_block < 1:
        problems.append(f"steps_per_block={config.steps_per_block} must be 1 or more")
    if not 0 <= config.warmup_steps <= config.steps_per_block:
        problems.append(f"warmup_steps={config.warmup_steps} must be 0 to steps_per_block={config.steps_per_block}")
    if not 0 <= config.coverage_floor <= 1:
        problems.append(f"coverage_floor={config.coverage_floor} must be 0 to 1")
    unknown = sorted(set(config.always_active) - set(ALWAYS_ACTIVE_KINDS))
    if unknown:
        problems.append(f"always_active has {unknown}, but only {', '.join(ALWAYS_ACTIVE_KINDS)} can stay active")
    return problems
