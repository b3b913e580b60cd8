"""What tests of `load_model` share: the launchers' environments, a config, an adapter and a batch."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import BitsAndBytesConfig

CPU = {"ACCELERATE_USE_CPU": "true"}
FSDP2 = {**CPU, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ENGINES = {"one process": (1, {}), "fsdp2": (2, FSDP2), "fsdp2, 3 ranks": (3, FSDP2), "ddp": (2, CPU)}
LORA = LoraConfig(r=4, target_modules="all-linear")


def nf4(**changes: Any) -> BitsAndBytesConfig:
    settings = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return BitsAndBytesConfig(**{**settings, **changes})


def batch() -> dict[str, Tensor]:
    ids = torch.arange(60).view(3, 20)
    return {"input_ids": ids, "labels": ids}


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
