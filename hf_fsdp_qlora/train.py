"""From a recipe to what `load_model` and the trainer take: configs, optimizer, checkpoint to resume from, logging.

`recipes/sft.py` shows the order; the tokenizer and the data are next door, in data.py.

Heavy imports are inside the functions: the command line reads this module's neighbours without them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fsdp_qlora.config import Recipe, load_recipe, parse_command_line
from hf_fsdp_qlora.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, HqqConfig
    from trl import SFTConfig

    from hf_fsdp_qlora.expand import Expansion
    from hf_fsdp_qlora.rotary.config import RotaryConfig

logger = logging.getLogger(__name__)


def parse_recipe(argv: Sequence[str] | None = None) -> Recipe:
    """The recipe of a command line, `--config RECIPE [--key value ...]`, with the keys that training needs.

    Raises:
        ConfigError: see `load_recipe`; or a key that training needs is not set.
    """
    name, overrides = parse_command_line(sys.argv[1:] if argv is None else argv)
    recipe = load_recipe(name, overrides)
    missing = [key for key in ("model_name_or_path", "dataset_name") if not recipe.get(key)]
    if missing:
        raise ConfigError(f"{recipe.path} does not set {' and '.join(missing)}. Set it there or with --{missing[0]}.")
    if not any(recipe.get(key) for key in ("use_peft", "adapter_name_or_path", "rotary_active")):
        raise ConfigError(
            "Nothing would be trained. Set use_peft: true for a new adapter, or adapter_name_or_path, or "
            "rotary_active to train the weights themselves."
        )
    return recipe


def check_run(recipe: Recipe) -> None:
    """Apply every rule of `hf-fsdp-qlora validate` to the recipe and what the launcher put into the environment.

    Raises:
        ConfigError: all problems in one message, each with field, value, reason and fix.
    """
    from hf_fsdp_qlora.engine import launched_config, resolve_device, resolve_engine
    from hf_fsdp_qlora.validation import validate

    validate(launched_config(resolve_engine(recipe.qlora_args.fsdp_engine), resolve_device()), recipe)


def configure_logging() -> None:
    """Our decisions on rank 0, warnings on every rank."""
    from hf_fsdp_qlora.distributed import local_rank

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_fsdp_qlora").setLevel(logging.WARNING if local_rank() else logging.INFO)
    # transformers 5.17, the oldest we support, knows only the old name of what 5.23 calls activation_checkpointing.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)


def numbers(recipe: Recipe) -> dict[str, Any]:
    """`load_model`'s precision, dtype and adapter_dtype. With a preset, only what the recipe sets beside it, so that
    contradictions are found."""
    import torch

    preset = recipe.qlora_args.precision
    dtypes = {"dtype": model_dtype(recipe), "adapter_dtype": getattr(torch, recipe.get("adapter_dtype"))}
    given = {key: value if preset is None or key in recipe.values else None for key, value in dtypes.items()}
    return {"precision": preset, **given}


def model_dtype(recipe: Recipe) -> torch.dtype:
    """`dtype` as torch names it; "auto" is the dtype in the checkpoint's config. `precision` sets it too."""
    import torch
    from transformers import AutoConfig

    from hf_fsdp_qlora.precision import resolve_precision

    name = recipe.get("dtype")
    preset = recipe.qlora_args.precision
    if preset is not None and "dtype" not in recipe.values:
        return resolve_precision(preset).dtype
    if name not in (None, "auto"):
        return getattr(torch, name)
    config = AutoConfig.from_pretrained(
        recipe.get("model_name_or_path"),
        revision=recipe.get("model_revision"),
        trust_remote_code=recipe.get("trust_remote_code"),
    )
    return config.dtype or torch.float32


def quantization_config(recipe: Recipe) -> Any:
    """The config for `load_in_4bit`, `int8_type` or `hqq_nbits` and their companions; None where none is set.

    Raises:
        ConfigError: more than one is set; or `train_new_layers` with a model that `expand` has not written.
    """
    check_format_keys(recipe)
    skip = _expansion(recipe).new_modules if recipe.get("train_new_layers") else None
    if recipe.get("int8_type"):
        return _int8_config(recipe, skip)
    if recipe.get("hqq_nbits"):
        return _hqq_config(recipe, skip)
    config = _bitsandbytes_config(recipe)
    if config is not None and skip is not None:
        config.llm_int8_skip_modules = skip
    return config


def check_format_keys(recipe: Recipe) -> None:
    """Refuse keys of more than one weight format, or of a format that is not chosen.

    Raises:
        ConfigError: as the rule of `validate` says it.
    """
    from hf_fsdp_qlora.validation import Run, apply_rules, raise_for
    from hf_fsdp_qlora.validation_rules import one_format_is_chosen

    raise_for(apply_rules([one_format_is_chosen], Run({}, recipe.values)))


def _int8_config(recipe: Recipe, skip: list[str] | None) -> Any:
    from hf_fsdp_qlora.quantization import DynamicInt8Config, LinearInt8Config

    config_class = {"dynamic": DynamicInt8Config, "linear": LinearInt8Config}[recipe.get("int8_type")]
    return config_class(recipe.get("int8_block_size"), modules_to_not_convert=skip)


def _hqq_config(recipe: Recipe, skip: list[str] | None) -> HqqConfig:
    from transformers import HqqConfig

    settings: dict[str, Any] = {key: recipe.get(f"hqq_{key}") for key in ("nbits", "group_size", "axis")}
    if skip is not None:
        settings["skip_modules"] = skip
    return HqqConfig(**settings)


def _bitsandbytes_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """As TRL builds it; ours where the block size is not 64."""
    from trl import get_quantization_config

    from hf_fsdp_qlora.quantization import BlockwiseFourBitConfig

    dtype = str(model_dtype(recipe)).removeprefix("torch.")
    config = get_quantization_config(dataclasses.replace(recipe.model_args, dtype=dtype))
    blocksize = recipe.get("bnb_4bit_blocksize")
    if config is not None and config.load_in_4bit and blocksize != 64:
        keys = ("quant_type", "use_double_quant", "compute_dtype", "quant_storage")
        settings = {f"bnb_4bit_{key}": getattr(config, f"bnb_4bit_{key}") for key in keys}
        config = BlockwiseFourBitConfig(bnb_4bit_blocksize=blocksize, **settings)
    return config


def adapter_config(recipe: Recipe) -> PeftConfig | None:
    """What is trained: LoRA as TRL builds it, or the layers that `expand` added; None to continue a saved adapter.

    Raises:
        ConfigError: `train_new_layers` with a model that `expand` has not written.
    """
    from trl import get_peft_config

    from hf_fsdp_qlora.new_layers import new_layers_config

    if recipe.get("adapter_name_or_path"):
        return None
    if recipe.get("train_new_layers"):
        return new_layers_config(_expansion(recipe))
    return get_peft_config(recipe.model_args)


def rotary_config(recipe: Recipe) -> RotaryConfig | None:
    """What `rotary_active` and its companions ask for, with the run's seed; None where it is not set.

    Raises:
        ConfigError: a value cannot be.
    """
    from hf_fsdp_qlora.rotary.config import RotaryConfig

    if recipe.rotary_args.rotary_active is None:
        return None
    values = {key.removeprefix("rotary_"): value for key, value in vars(recipe.rotary_args).items()}
    return RotaryConfig(**values, seed=recipe.get("seed"))


def optimizer_choice(recipe: Recipe) -> tuple[type, dict[str, Any]] | None:
    """`optimizer_cls_and_kwargs` for the trainer: PEFT's LoRA+ groups around the recipe's `optim`, or None.

    Raises:
        ConfigError: the ratio is below 1.
    """
    ratio = recipe.qlora_args.loraplus_lr_ratio
    if ratio is None:
        return None
    if ratio < 1:
        raise ConfigError(
            f"loraplus_lr_ratio={ratio} must be 1 or more (16 is the paper's). Leave it out for plain LoRA."
        )
    from transformers import Trainer

    args = recipe.training_args
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    kwargs |= {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": args.weight_decay}
    return LoraPlusFactory, {"optimizer_cls": optimizer_cls, **kwargs}


class LoraPlusFactory:
    """What the Trainer calls to make an optimizer that needs to see parameter names."""

    def __call__(
        self, model: Any, *, optimizer_cls: type[torch.optim.Optimizer], **kwargs: Any
    ) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        optimizer = create_loraplus_optimizer(model, optimizer_cls, **kwargs)
        # PEFT leaves groups empty, and torch.distributed.checkpoint cannot resume more than one empty group.
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer


def resume_point(args: SFTConfig) -> str | None:
    """The checkpoint `resume_from_checkpoint` means: a folder, "true" (the last one), "auto" (the last, if any).

    The last one is the last whose save was completed.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    from hf_fsdp_qlora.trainer_compat.unfinished import last_complete_checkpoint

    value = args.resume_from_checkpoint
    if value is None or value.lower() == "false":
        return None
    if value.lower() not in ("true", "auto"):
        if not Path(value).is_dir():
            raise ConfigError(f"resume_from_checkpoint={value!r} is no folder. Give a checkpoint, true or auto.")
        return value
    assert args.output_dir is not None  # SFTConfig has put a default there
    last = last_complete_checkpoint(Path(args.output_dir))
    if last is None and value.lower() == "true":
        raise ConfigError(
            f"resume_from_checkpoint=true, but {args.output_dir} has no complete checkpoint. "
            "Use auto to start from the beginning where there is none."
        )
    return None if last is None else str(last)


def save_report(report: Any, args: SFTConfig) -> None:
    """Keep what `load_model` did beside the adapter, as load_report.json (rank 0 only)."""
    from hf_fsdp_qlora.distributed import rank

    assert args.output_dir is not None  # SFTConfig has put a default there
    if rank() == 0:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(report), indent=2, default=str)
        (folder / "load_report.json").write_text(text + "\n", encoding="utf-8")


def _expansion(recipe: Recipe) -> Expansion:
    from hf_fsdp_qlora.base_checkpoint import local_folder
    from hf_fsdp_qlora.expand import read_expansion

    return read_expansion(local_folder(recipe.get("model_name_or_path"), recipe.get("model_revision"), None))
