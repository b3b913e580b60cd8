"""Optimizers that cannot work on shards, refused when the trainer is made and not at its first step or save.

What was seen on two ranks (tests/test_optimizers.py, torch 2.13, bitsandbytes 0.50.2):

- FSDP2: the first step of bitsandbytes' optimizers and of Adafactor raises, because their ops do not take DTensors.
- FSDP1: bitsandbytes' optimizers train, but their state cannot be saved. Adafactor is another algorithm there: a flat
  shard has no rows and columns to factor, and each rank scales by its own part.

bitsandbytes hides its state from FSDP1 (`Optimizer8bit.state_dict` nests it under one key), so that what rank 0 holds
would be saved as the state of all ranks, and with `use_orig_params` saving raises.
"""

from __future__ import annotations

from transformers import TrainingArguments

from hf_fsdp_qlora.engine import Engine
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.validation_rules import BITSANDBYTES_OPTIMIZERS

_FIX = "Set optim: adamw_torch_fused; its states are sharded, and for adapters they are small"


def check_optimizer(args: TrainingArguments, engine: Engine) -> None:
    """Refuse `optim` where it cannot train or its state cannot be saved.

    Raises:
        ConfigError: with what would happen and what to set.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if engine == "fsdp2" and name in (*BITSANDBYTES_OPTIMIZERS, "adafactor"):
        raise ConfigError(
            f"optim={name!r} does not take the DTensors that FSDP2 makes of parameters: the first step would raise. "
            f"{_FIX}."
        )
    if engine == "fsdp1" and name == "adafactor":
        raise ConfigError(
            "optim='adafactor' factors matrices, and under FSDP1 parameters are flat shards, scaled on each rank by "
            f"that rank's part alone. {_FIX}."
        )
    saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no" and not args.save_only_model
    if engine == "fsdp1" and name in BITSANDBYTES_OPTIMIZERS and saves:
        raise ConfigError(
            f"optim={name!r} trains under FSDP1, but its state cannot be saved: bitsandbytes hides it from FSDP, and "
            f"rank 0's part would be written for all. {_FIX}. Or set save_only_model: true, and do without resuming."
        )
