"""Where a model's adapter comes from: a config and a seed, a saved adapter, or nowhere.

In two phases, as in lora.py: injected on meta before the model is sharded, filled once everything has storage.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel

from hf_fsdp_qlora.base_record import other_base
from hf_fsdp_qlora.distributed import same_outcome
from hf_fsdp_qlora.dora import initialize_magnitudes
from hf_fsdp_qlora.lora import ADAPTER_NAME, add_adapter, initialize_adapters, load_adapter_weights
from hf_fsdp_qlora.lora_config import check_peft_config, read_adapter_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterSource:
    """`load_model`'s arguments that say which adapter the model gets.

    Attributes:
        peft_config: of a new adapter; beside a saved one it must describe the same tensors.
        saved: hub id or folder of a saved adapter, or None.
        is_trainable: False freezes a saved one.
        dtype: of everything that is trained.
        seed: for a new one.
        hub_kwargs: token, cache_dir, local_files_only.
    """

    peft_config: PeftConfig | None
    saved: str | None
    is_trainable: bool
    dtype: torch.dtype
    seed: int
    hub_kwargs: dict[str, Any]

    def inject(self, model: PreTrainedModel) -> PeftModel | PreTrainedModel:
        """The model with its adapter, both on meta; the model itself where no adapter is asked for.

        Raises:
            ConfigError: the adapter cannot be honoured.
        """
        if self.saved is not None:
            config = read_adapter_config(
                self.saved, model, peft_config=self.peft_config, is_trainable=self.is_trainable, **self.hub_kwargs
            )
            return add_adapter(model, config, adapter_dtype=self.dtype)
        if self.peft_config is None:
            return model
        check_peft_config(self.peft_config, model)
        return add_adapter(model, cast(LoraConfig, self.peft_config), adapter_dtype=self.dtype)

    def warn_of_another_base(self, quantization_config: Any, dtype: torch.dtype) -> None:
        """Warn if a saved adapter was trained on a base in another format."""
        difference = None if self.saved is None else other_base(Path(self.saved), quantization_config, dtype)
        if difference is not None:
            logger.warning("%s", difference)

    def fill(self, root: PeftModel | PreTrainedModel) -> None:
        """Read the saved adapter, or initialise a new one. Collective: DoRA looks at the gathered weights."""
        if not isinstance(root, PeftModel):
            return
        if self.saved is None:
            initialize_adapters(root, self.seed)
        else:
            with same_outcome("loading the adapter"):
                load_adapter_weights(root, self.saved, **self.hub_kwargs)
        initialize_magnitudes(root, ADAPTER_NAME, keep_magnitudes=self.saved is not None)
