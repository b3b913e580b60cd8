"""Training the layers that `expand` added and nothing else, in full precision over a quantised frozen base.

PEFT's `modules_to_save` does it, without any LoRA: the modules of the new layers get trained copies (masters in
`adapter_dtype`), everything else is frozen. So checkpoints, resuming and saving are those of an adapter, stock PEFT
loads the result over the expanded model, and `merge_adapter` makes it a plain transformers folder. The price is that
the frozen originals of the new layers stay in memory, 2 bytes on top of the 16 that an AdamW master takes.

The new layers must not be quantised: pass `Expansion.new_modules` as `llm_int8_skip_modules`.

Source: LLaMA Pro, arXiv 2401.02415, section 3.3 (the original blocks are frozen, the new ones are trained whole).
"""

from __future__ import annotations

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from hf_fsdp_qlora.expand import Expansion


def new_layers_config(expansion: Expansion) -> LoraConfig:
    """The `peft_config` that trains exactly the new layers of an expanded model.

    Args:
        expansion: what `read_expansion` read beside the model.
    """
    return LoraConfig(
        target_modules=DUMMY_TARGET_MODULES,  # PEFT's word for "no LoRA layer"
        modules_to_save=expansion.new_modules,
        task_type="CAUSAL_LM",
    )
