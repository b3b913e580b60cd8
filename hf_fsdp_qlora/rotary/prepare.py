"""`prepare_rotary`: from a loaded model to what a stock trainer needs to train all of it, a few blocks at a time.

    config = RotaryConfig(active="10%", steps_per_block=50)
    model = load_model(path, rotary=config)
    rotary = prepare_rotary(model, config)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=..., callbacks=[rotary.callback],
        optimizer_cls_and_kwargs=rotary.optimizer(args),
    )
    trainer.train()
    trainer.save_model(out)  # a plain model, from the masters

The order of a run, which every part relies on:

1. `prepare_rotary` plans the blocks, opens the masters over the checkpoint's files and makes every parameter
   trainable, the weights of quantised layers as an empty `dense`.
2. The trainer builds its optimizer from what is trainable, so the groups hold everything and never change.
3. `on_train_begin` freezes all and activates the first blocks; `on_step_end` rotates.
4. At the end everything is parked and trainable again, and the masters are the result.

Left out: adapters beside it, FSDP1 (a flat parameter cannot be taken apart), offload by FSDP (what is parked is on the
host already, as masters).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from hf_fsdp_qlora.distributed import rank, world_size
from hf_fsdp_qlora.engine import resolve_device
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.quantization import backend_for_config
from hf_fsdp_qlora.rotary.active import ActiveSet, RotaryParameter
from hf_fsdp_qlora.rotary.callback import RotaryCallback
from hf_fsdp_qlora.rotary.config import RotaryConfig
from hf_fsdp_qlora.rotary.evaluation import masters_in_forward
from hf_fsdp_qlora.rotary.export import export_model
from hf_fsdp_qlora.rotary.gradients import GradientReducer
from hf_fsdp_qlora.rotary.masters import Masters
from hf_fsdp_qlora.rotary.moments import Moments
from hf_fsdp_qlora.rotary.optimizer import RotaryOptimizer, inner_optimizer
from hf_fsdp_qlora.rotary.plan import Plan, active_bytes, make_plan, plan_blocks
from hf_fsdp_qlora.rotary.schedule import Schedule
from hf_fsdp_qlora.rotary.state import load_state, save_state
from hf_fsdp_qlora.trainer_compat import Attachment, FullTraining, attachment, full_training, set_full_training


class Rotary(FullTraining):
    """A rotary run; made by `prepare_rotary`.

    Attributes:
        config: its settings.
        plan: the blocks.
        schedule: which of them are active when.
        masters: the durable weights.
        active: what the device holds.
        moments: optimizer states of parked parameters.
        callback: for the trainer.
    """

    def __init__(self, model: PreTrainedModel, config: RotaryConfig, plan: Plan, active: ActiveSet) -> None:
        self.model = model
        self.config = config
        self.plan = plan
        self.active = active
        self.masters = active.masters
        self.moments = Moments(config.keep_bits)
        self.schedule = Schedule(plan, order=config.order, seed=config.seed, coverage_floor=config.coverage_floor)
        self.callback = RotaryCallback(self)

    def optimizer(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """The trainer's `optimizer_cls_and_kwargs`: what `optim` and its companions ask for, over whatever is active.

        Raises:
            ConfigError: `optim` is one that needs whole weights.
        """
        optimizer_cls, kwargs = inner_optimizer(args)
        ours = {"active": self.active, "moments": self.moments, "seed": self.config.seed}
        return RotaryOptimizer, {**ours, "optimizer_cls": optimizer_cls, **kwargs}

    def names(self, blocks: Iterable[int]) -> list[str]:
        """The parameters of these blocks, in order."""
        return [name for block in blocks for name in self.plan.blocks[block].parameters]

    def export(self, folder: Path) -> None:
        """Write the masters as a plain model, in the dtype of the model. Collective."""
        self.active.flush()
        export_model(self.model, self.masters, folder, dtype=self.model.dtype)

    def save_checkpoint(self, folder: Path) -> None:
        """Write masters, optimizer states and where the rotation stands. Collective."""
        self.active.flush()
        save_state(folder, self.masters, self.callback.all_moments(), self.callback.state_dict())

    def exact_weights(self) -> AbstractContextManager[None] | None:
        """Where `eval_masters` asks for a second evaluation, the context for it."""
        return masters_in_forward(self.model, self.active) if self.config.eval_masters else None

    def load_checkpoint(self, folder: Path) -> None:
        """Go back to what `save_checkpoint` wrote, on any number of ranks. Collective."""
        self.callback.stop()
        moments, state = load_state(folder, self.masters)
        self.moments.kept = moments
        self.callback.load_state_dict(state)
        self.active.refresh()


def prepare_rotary(model: PreTrainedModel, config: RotaryConfig) -> Rotary:
    """Set a loaded model up for rotary training. Collective; before the trainer is made.

    Args:
        model: of `load_model` without an adapter, in `config.frozen_format`. Under FSDP2 `load_model` must have been
            given the config too (`rotary=config`).

    Raises:
        ConfigError: the model was loaded in a way that rotary training cannot go on from.
    """
    attached = _check_model(model)
    _check_dtypes(model, config)
    assert attached.stored is not None  # of a model without an adapter
    device = resolve_device()
    master_dtype = config.torch_master_dtype
    shapes = {name: stored.shape for name, stored in attached.stored.items()}
    plan = make_plan(
        plan_blocks(model, shapes, config.split),
        limit=config.limit,
        always_active=config.always_active,
        bytes_per_active=active_bytes(model.dtype.itemsize, master_dtype.itemsize),
    )
    names = [name for block in plan.blocks for name in block.parameters]
    stored = {name: attached.stored[name] for name in names}
    masters = Masters(stored, dtype=master_dtype, rank=rank(), world_size=world_size())
    parameters = [_rotary_parameter(model, name, device) for name in names]
    for owner in parameters:
        if isinstance(owner.parameter, DTensor):
            raise ConfigError(
                f"FSDP2 has sharded {owner.name}, which rotary training replicates and divides itself. Pass the "
                "config to load_model too: load_model(..., rotary=config)."
            )
    GradientReducer(owner.parameter for owner in parameters)
    active = ActiveSet(model, parameters, masters, device=device, largest_visit=plan.largest_visit)
    active.set_trainable(True)
    rotary = Rotary(model, config, plan, active)
    set_full_training(model, rotary)
    return rotary


def _rotary_parameter(model: nn.Module, name: str, device: torch.device) -> RotaryParameter:
    path, _, own_name = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, QuantizedLinear) and own_name == "weight":
        shape = torch.Size((module.out_features, module.in_features))
        return RotaryParameter(name, module.add_dense(device), shape, module)
    parameter = getattr(module, own_name)
    return RotaryParameter(name, parameter, parameter.shape)


def _check_model(model: Any) -> Attachment:
    """What `load_model` left on a model that can be trained in turn."""
    if isinstance(model, PeftModel):
        raise ConfigError(
            "The model has an adapter, and rotary training trains the weights themselves. Load it without peft_config "
            "(use_peft: false)."
        )
    attached = attachment(model)
    if attached is None:
        raise ConfigError("The model was not loaded by load_model(), which knows where its weights are. Use it.")
    if full_training(model) is not None:
        raise ConfigError("prepare_rotary() was called on this model before. Load it again to begin anew.")
    return attached


def _check_dtypes(model: PreTrainedModel, config: RotaryConfig) -> None:
    if model.dtype == torch.float16:
        raise ConfigError("dtype=float16 cannot hold what training adds to weights. Load the model in bfloat16.")
    if config.master_dtype == "bfloat16" and model.dtype == torch.float32:
        raise ConfigError(
            "master_dtype='bfloat16' under a float32 model would round what the device has exactly. Use "
            "master_dtype='float32', or load the model in bfloat16."
        )
    wanted = backend_for_config(config.frozen_format, model.dtype).spec
    found = {module.backend.spec for module in model.modules() if isinstance(module, QuantizedLinear)}
    if found != {wanted}:
        raise ConfigError(
            f"RotaryConfig has frozen={config.frozen!r}, but the model was loaded with {_readable(found)}. Load it "
            "with load_model(..., rotary=config), or quantization_config=config.frozen_format."
        )


def _readable(specs: set[str]) -> str:
    return ", ".join(sorted(specs)) or "no quantised layers"
