"""Check an accelerate config and a recipe together, and report everything that is wrong at once.

Most runs that fail do so minutes or hours in, on a setting that is fine by itself and wrong beside another one; some
do not fail and train something else. Each such combination is one rule in validation_rules.py, with what is wrong,
why it hurts and what to change. No GPU, no weights and no process group are needed; what depends on the model is
checked when its config is on this machine, and listed as not checked otherwise.

Order: the rules are independent; problems come in the order of the rules. Left out: what upstream's own dataclasses
refuse by themselves with a clear message before anything is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.model_shape import ModelShape, shape_of
from hf_fsdp_qlora.resources import find_accelerate_config

if TYPE_CHECKING:
    from hf_fsdp_qlora.engine import Engine

DEFAULTS: dict[str, Any] = {
    "rotary_active": None,
    "activation_offloading": False,
    "adapter_name_or_path": None, "adapter_dtype": "float32", "assistant_only_loss": False,
    "attn_implementation": None, "bf16": None, "bnb_4bit_blocksize": 64, "bnb_4bit_quant_storage": None,
    "completion_only_loss": None, "dataset_format": None,
    "dtype": "float32", "fp16": False, "fsdp": None, "hqq_nbits": None, "int8_type": None,
    "gradient_accumulation_steps": 1, "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": None, "load_best_model_at_end": False,
    "load_in_4bit": False, "load_in_8bit": False, "lora_dropout": 0.05, "lora_modules_to_save": None, "lora_r": 16,
    "lora_target_modules": None, "lora_target_parameters": None, "max_length": 1024, "model_init_kwargs": None,
    "model_name_or_path": None, "model_revision": "main", "offload": None, "offload_pin_memory": True,
    "replicate_head": False, "embedding_on_host": False,
    "optim": "adamw_torch_fused", "packing": False, "packing_strategy": "bfd", "per_device_train_batch_size": 8,
    "save_on_each_node": False, "save_only_model": False, "save_strategy": "steps", "trust_remote_code": False,
    "use_bnb_nested_quant": False, "use_peft": False,
}  # fmt: skip
"""Upstream's defaults of the keys that the rules read, so that checking needs no torch. A test compares them."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `rule` is the name of the rule's function, filled in by `find_problems`."""

    field: str
    value: Any
    why: str
    fix: str
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.field}: {self.value}\n    why: {self.why}\n    fix: {self.fix}"


@dataclass(frozen=True)
class ModelFacts:
    """What the rules know of a model: its name, the classes of its modules, its dtype ("bfloat16"), and its sizes
    (None where a rule that needs them is not applied)."""

    name: str
    classes: frozenset[str]
    dtype: str | None
    shape: ModelShape | None


@dataclass(frozen=True)
class Run:
    """What a rule sees.

    Attributes:
        accelerate: the accelerate config file.
        recipe: the keys the recipe sets.
        model: None if the model's config is not on this machine.
        gpu_memory_bytes: of one card, None if not given.
    """

    accelerate: Mapping[str, Any]
    recipe: Mapping[str, Any]
    model: ModelFacts | None = None
    gpu_memory_bytes: int | None = None

    def get(self, key: str) -> Any:
        """The recipe's value, what its precision preset makes of it, or upstream's default."""
        preset = self.recipe.get("precision")
        if key in ("dtype", "adapter_dtype", "bf16") and key not in self.recipe and preset not in (None, "fp16"):
            from hf_fsdp_qlora.precision import recipe_values

            return recipe_values(preset)[key]
        return self.recipe.get(key, DEFAULTS[key])

    def fsdp(self, key: str) -> Any:
        """A key of the accelerate config's `fsdp_config`, None if absent."""
        return (self.accelerate.get("fsdp_config") or {}).get(key)

    @property
    def distributed_type(self) -> str:
        # YAML reads a bare NO as false, and accelerate writes it quoted.
        value = self.accelerate.get("distributed_type", "NO")
        return "NO" if value is False else str(value)

    @property
    def fsdp_version(self) -> int | None:
        """1 or 2, None without FSDP. accelerate's default is 1."""
        if self.distributed_type != "FSDP":
            return None
        return int(self.fsdp("fsdp_version") or 1)

    @property
    def engine(self) -> Engine:
        """What `load_model` calls it."""
        if self.fsdp_version is not None:
            return "fsdp1" if self.fsdp_version == 1 else "fsdp2"
        return "ddp" if self.num_processes > 1 else "none"

    @property
    def num_processes(self) -> int:
        return int(self.accelerate.get("num_processes") or 1)

    @property
    def replicas(self) -> int:
        """Copies of the model under HSDP, 1 elsewhere."""
        sizes = self.accelerate.get("parallelism_config") or {}
        return int(sizes.get("parallelism_config_dp_replicate_size", 1)) if self.fsdp_version == 2 else 1

    @property
    def offload(self) -> str:
        """What lives in host memory: the recipe's word, else accelerate's flag."""
        wanted = self.get("offload")
        if wanted is not None:
            return str(wanted)
        return "all" if self.fsdp_version and is_true(self.fsdp("fsdp_offload_params")) else "none"

    @property
    def dtype(self) -> str | None:
        """The dtype `load_model` gets; None if only the model's config could tell."""
        wanted = self.get("dtype")
        if wanted not in (None, "auto"):
            return str(wanted)
        return self.model.dtype if self.model else None


Rule = Callable[[Run], Problem | None]
"""One rule: what is wrong with a run, or None."""


@dataclass(frozen=True)
class Findings:
    """All problems, and what could not be checked with the reason."""

    problems: list[Problem] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)


def validate(
    accelerate_config: str | os.PathLike[str] | Mapping[str, Any],
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Any,
    *,
    gpu_memory_bytes: int | None = None,
) -> list[str]:
    """Raise if an accelerate config and a recipe cannot work together.

    Args: as `find_problems`.

    Returns:
        What could not be checked, with the reason.

    Raises:
        ConfigError: all problems in one message, each with field, value, reason and fix.
    """
    findings = find_problems(accelerate_config, recipe, gpu_memory_bytes=gpu_memory_bytes)
    raise_for(findings.problems)
    return findings.not_checked


def raise_for(problems: Sequence[Problem]) -> None:
    """Raise one ConfigError that lists the problems, if there are any."""
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ConfigError(f"These settings cannot work together:\n{listed}")


def apply_rules(rules: Sequence[Rule], run: Run) -> list[Problem]:
    """What the rules find, each problem with the name of its rule."""
    found = [(rule.__name__, rule(run)) for rule in rules]
    return [replace(problem, rule=name) for name, problem in found if problem is not None]


def find_problems(
    accelerate_config: str | os.PathLike[str] | Mapping[str, Any],
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Any,
    *,
    gpu_memory_bytes: int | None = None,
) -> Findings:
    """Apply every rule.

    Args:
        accelerate_config: a YAML file that accelerate reads, the name of a shipped one, or its contents.
        recipe: a YAML file, the name of a shipped recipe, a `Recipe` from `load_recipe`, or its keys and values.
        gpu_memory_bytes: of one card, to check the predicted peak.

    Raises:
        ConfigError: a file cannot be read, or the recipe has unknown keys.
    """
    from hf_fsdp_qlora.validation_model_rules import MODEL_RULES, memory_fits
    from hf_fsdp_qlora.validation_rules import RULES

    run = Run(accelerate_values(accelerate_config), _recipe_values(recipe), gpu_memory_bytes=gpu_memory_bytes)
    facts, reason = _model_facts(run)
    run = Run(run.accelerate, run.recipe, facts, gpu_memory_bytes)
    rules = RULES if facts is None else (*RULES, *MODEL_RULES)
    problems = apply_rules(rules, run)
    if facts is None:
        names = ", ".join(rule.__name__.replace("_", " ") for rule in (*MODEL_RULES, memory_fits))
        return Findings(problems, [f"{names}: {reason}"])
    if gpu_memory_bytes is None:
        return Findings(problems, ["memory fits: the memory of a card was not given"])
    try:
        too_large = memory_fits(run)
    except ConfigError as error:
        return Findings(problems, [f"memory fits: {error}"])
    problems += [replace(too_large, rule="memory_fits")] if too_large is not None else []
    return Findings(problems)


def accelerate_values(config: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """The contents of an accelerate config, which is given as for `find_problems`.

    Raises:
        ConfigError: there is no such file, or it is no mapping.
    """
    if isinstance(config, Mapping):
        return config
    path = find_accelerate_config(Path(config))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values, got {type(values).__name__}.")
    return values


def is_true(value: Any) -> bool:
    """How accelerate reads a flag of its config, which may be a word."""
    return value is True or str(value).lower() in ("true", "yes", "1", "on", "y", "t")


def _recipe_values(recipe: Any) -> Mapping[str, Any]:
    if isinstance(recipe, Mapping):
        return recipe
    if isinstance(recipe, (str, os.PathLike)):
        from hf_fsdp_qlora.config import load_recipe

        return load_recipe(Path(recipe)).values
    return recipe.values


def _model_facts(run: Run) -> tuple[ModelFacts | None, str]:
    """The model's facts, or None and why there are none. Nothing is downloaded."""
    name = run.get("model_name_or_path")
    if name is None:
        return None, "the recipe names no model"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"trust_remote_code": run.get("trust_remote_code")}
    try:
        config = AutoConfig.from_pretrained(name, revision=run.get("model_revision"), local_files_only=True, **options)
    except OSError:
        return None, f"the config of {name} is not on this machine"
    except ValueError as error:  # no model_type, or one that this transformers does not know
        return None, f"the config of {name} cannot be read: {str(error).splitlines()[0]}"
    attention = run.get("attn_implementation") or config._attn_implementation
    with torch.device("meta"):
        # Attention kernels that are not installed here may be there where the run will be.
        known = attention if attention in ("sdpa", "eager") else "sdpa"
        try:
            skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=known, **options)
        except ValueError as error:  # an encoder, for example
            return None, f"{name} is no causal language model: {str(error).splitlines()[0]}"
    try:
        shape = shape_of(skeleton, str(name))
    except ConfigError as error:
        return None, str(error)
    classes = frozenset(type(module).__name__ for module in skeleton.modules())
    dtype = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    return ModelFacts(str(name), classes, dtype, shape), ""
