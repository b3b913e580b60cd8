"""Turns the blocks while the trainer trains: who is active, when they change, and what of it is logged.

Rotation happens at the end of a step, after gradients were cleared and before anything is saved or evaluated, so a
checkpoint always holds the state in which the next step begins.

Logged, beside the loss: `rotary/visit` (from 0), `rotary/active_blocks` (how many), `rotary/lowest_active_block` (its
index; backward stops there), `rotary/coverage` (share of the parameters that were active so far),
`rotary/device_bytes_per_parameter` and `rotary/host_bytes_per_parameter` (of this rank: what it holds of the model
between steps, optimizer states included, over the whole model's parameters), and for blocks parked since the last log,
`rotary/update_norm/<block>`: the L2 norm of what the visit changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_fsdp_qlora.distributed import world_size
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.rotary.optimizer import RotaryOptimizer
from hf_fsdp_qlora.trainer_compat import LogSource

if TYPE_CHECKING:
    from hf_fsdp_qlora.rotary.prepare import Rotary

logger = logging.getLogger(__name__)


class RotaryCallback(LogSource):
    """Rotates the blocks of one `Rotary`.

    Args:
        rotary: of `prepare_rotary`, which makes this callback too.

    Attributes:
        visit: the current one, from 0.
        steps_in_visit: optimizer steps that it has had.
    """

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.visit = 0
        self.steps_in_visit = 0
        self._optimizer: RotaryOptimizer | None = None
        self._active: tuple[int, ...] = ()
        self._update_norms: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Where the rotation stands, for JSON."""
        return {
            "visit": self.visit, "steps_in_visit": self.steps_in_visit, "schedule": self.rotary.schedule.state_dict(),
            "update_norms": self._update_norms,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was called; the next `on_train_begin` activates the blocks."""
        self.visit, self.steps_in_visit = state["visit"], state["steps_in_visit"]
        self._update_norms = dict(state["update_norms"])
        self.rotary.schedule.load_state_dict(state["schedule"])

    def all_moments(self) -> dict[str, dict[str, Any]]:
        """Optimizer states by parameter, flat over this rank's slice: of active ones, and of parked ones as kept."""
        active = {} if self._optimizer is None else self._optimizer.moments()
        return {**self.rotary.moments.kept, **active}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check what the trainer made of our optimizer and model, and activate the first blocks. Collective.

        Raises:
            ConfigError: the trainer is not set up for rotary training.
        """
        self._optimizer = _our_optimizer(kwargs["optimizer"])
        _check_checkpointing(args)
        model: Any = self.rotary.model
        # Gradient checkpointing's hook makes the embedding's output require gradients, and backward would go through
        # all frozen layers: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/modeling_utils.py
        # (enable_input_require_grads). Non-reentrant checkpointing does not need it.
        if args.gradient_checkpointing:
            model.disable_input_require_grads()
        if state.global_step == 0:
            self.visit = self.steps_in_visit = 0
            for name in self.rotary.masters.stored:  # of a checkpoint that was gone back to after training
                self.rotary.masters.drop_start(name)
        self._optimizer.step_number = state.global_step
        self.rotary.active.set_trainable(False)
        self._begin_visit()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the gradient norms of the active blocks, where the order goes by them. Collective."""
        if self.rotary.config.order == "importance":
            for block, norm in zip(self._active, self._gradient_norms(), strict=True):
                self.rotary.schedule.observe(block, norm)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on to the next visit when this one has had its steps. Collective."""
        self.steps_in_visit += 1
        if self.steps_in_visit == self.rotary.config.steps_per_block:
            self.visit += 1
            self.steps_in_visit = 0
            self._begin_visit()
        self._warm_up()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Park everything: the masters on the host are the result."""
        self.stop()

    def stop(self) -> None:
        """Park what is active, and let a trainer build its optimizer again. Collective."""
        self._leave(self._active)
        self._active = ()
        self.rotary.active.set_trainable(True)

    def log_values(self, state: TrainerState, logs: dict[str, float]) -> dict[str, float]:
        """See the module; update norms are logged once."""
        rotary, numel = self.rotary, self.rotary.plan.numel
        optimizer_bytes = 0 if self._optimizer is None else self._optimizer.state_bytes()
        norms, self._update_norms = self._update_norms, {}
        return {
            "rotary/visit": self.visit,
            "rotary/active_blocks": len(self._active),
            "rotary/lowest_active_block": min(self._active, default=0),
            "rotary/coverage": round(rotary.schedule.coverage(self.visit + 1), 4),
            "rotary/device_bytes_per_parameter": round((rotary.active.device_bytes() + optimizer_bytes) / numel, 4),
            "rotary/host_bytes_per_parameter": round(
                (rotary.masters.private_bytes + rotary.moments.num_bytes) / numel, 4
            ),
            **norms,
        }

    def _begin_visit(self) -> None:
        assert self._optimizer is not None
        rotary = self.rotary
        wanted = rotary.schedule.blocks_of_visit(self.visit)
        entering = [block for block in wanted if block not in self._active]
        self._leave([block for block in self._active if block not in wanted])
        names = rotary.names(entering)
        rotary.active.activate(names)
        self._optimizer.adopt(names)
        self._active = wanted
        self._warm_up()
        rotary.active.prefetch(rotary.names(rotary.schedule.blocks_of_visit(self.visit + 1)))
        if entering:
            logger.info("visit %d: %s", self.visit, ", ".join(rotary.plan.blocks[block].name for block in wanted))

    def _leave(self, blocks: Iterable[int]) -> None:
        """Park these blocks and note how far they went."""
        assert self._optimizer is not None or not tuple(blocks)
        rotary = self.rotary
        for block in blocks:
            names = rotary.names([block])
            self._optimizer.retire(names, keep=rotary.config.moments == "keep")  # type: ignore[union-attr]
            change = torch.tensor(sum(rotary.active.park(names).values()), device=rotary.active.device)
            if world_size() > 1:
                dist.all_reduce(change)
            self._update_norms[f"rotary/update_norm/{rotary.plan.blocks[block].name}"] = change.sqrt().item()

    def _warm_up(self) -> None:
        """The next step's learning rate over the schedule's: rising linearly through the first steps of a visit."""
        assert self._optimizer is not None
        steps = self.rotary.config.warmup_steps
        self._optimizer.learning_rate_factor = min(1.0, (self.steps_in_visit + 1) / (steps + 1))

    def _gradient_norms(self) -> list[float]:
        """Of each active block, the same on every rank to the last bit."""
        rotary = self.rotary
        norms = []
        for block in self._active:
            parameters = [rotary.active.parameters[name].parameter for name in rotary.names([block])]
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads).float())
        stacked = torch.stack(norms)
        if world_size() > 1:
            dist.broadcast(stacked, src=0)
        return stacked.tolist()


def _our_optimizer(optimizer: Any) -> RotaryOptimizer:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not isinstance(inner, RotaryOptimizer):
        raise ConfigError(
            f"The trainer made a {type(inner).__name__}, which cannot follow the blocks. Give the trainer "
            "optimizer_cls_and_kwargs=rotary.optimizer(args)."
        )
    return inner


def _check_checkpointing(args: TrainingArguments) -> None:
    kwargs: Any = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and kwargs.get("use_reentrant"):
        raise ConfigError(
            "Reentrant gradient checkpointing needs inputs that require gradients, so backward would go through every "
            "frozen layer. Set gradient_checkpointing_kwargs={'use_reentrant': False}, or leave it out."
        )
