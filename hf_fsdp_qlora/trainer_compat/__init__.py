"""What stock Trainer, SFTTrainer and accelerate need before they can train a model that `load_model` returned.

`load_model` shards the model while it loads. Upstream code assumes that it wraps the model itself, after the trainer
was made; every patch here closes one place where that assumption shows. `attach` is the only entry point:

- `model.py` changes the one model: what its state dict holds, how it is saved, its class names, `generate`.
- `patches.py` replaces a few functions of accelerate and transformers. Each replacement looks for the `Attachment`
  that `attach` left on the model and calls the original when there is none, so other models see stock code. It
  lists them all; how adapters are saved and resumed is in `saving.py`, whole models in `full_training.py`.
- `checkpoints.py` is what those replacements do with checkpoints: a checkpoint is a PEFT directory plus the
  optimizer, whatever `fsdp_state_dict_type` says, and each engine can resume what another one saved.

Every patch names the upstream issue or source it works around and when it can go. Left out: trainers that do not
derive from `transformers.Trainer`.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from hf_fsdp_qlora.checkpoint import StoredTensor
from hf_fsdp_qlora.engine import Engine, Offload
from hf_fsdp_qlora.precision import Precision, resolve_precision
from hf_fsdp_qlora.trainer_compat.flops import num_weights
from hf_fsdp_qlora.trainer_compat.full_training import FullTraining, full_training, set_full_training
from hf_fsdp_qlora.trainer_compat.logs import LogSource
from hf_fsdp_qlora.trainer_compat.model import Attachment, attachment, prepare_model
from hf_fsdp_qlora.trainer_compat.patches import install

__all__ = [
    "Attachment",
    "FullTraining",
    "LogSource",
    "attach",
    "attachment",
    "full_training",
    "install",
    "set_full_training",
]


def attach(
    model: PreTrainedModel,
    *,
    engine: Engine,
    precision: Precision | None = None,
    offload: Offload = "none",
    stored: Mapping[str, StoredTensor] | None = None,
) -> None:
    """Make `model` work with stock trainers. The last step of loading, after sharding and initialisation.

    Args:
        model: the PeftModel (the FSDP root under FSDP2), or the plain model without an adapter.
        engine: "none" (one process), "ddp" (the Trainer will wrap it), "fsdp1" (likewise) or "fsdp2" (sharded).
        precision: the dtypes it was loaded for; None for the default.
        offload: what lives in host memory.
        stored: where its weights are in the checkpoint; None with an adapter, whose base is never written.
    """
    install()
    marker = Attachment(engine, precision or resolve_precision(None), offload, stored, num_weights(model))
    prepare_model(model, marker)
