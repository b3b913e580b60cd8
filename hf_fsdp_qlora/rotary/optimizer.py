"""The optimizer that the trainer sees, and the user's own inside it.

The trainer builds it once, over all rotary parameters, and never sees a change: groups, learning rates and weight
decay are those of any other run, and a scheduler works on them. Parked parameters have no gradient and are passed
over. Inside, the user's optimizer (AdamW by default, bitsandbytes' for 8-bit moments) runs over this rank's master
slices of the active parameters alone, with the settings of their groups at that step.

Where the slices are views of fp32 parameters, a step is the inner optimizer's own step on the same memory: bit for bit
stock training. Else it is made in float32, some pieces at a time, so that temporary memory does not grow with what is
active.

Left out: optimizers that look at a weight's shape (Adafactor, Muon, GaLore, APOLLO) or take gradients in backward
(LOMO, layer-wise ones): slices are flat, and complete only after clipping. And bitsandbytes' paged ones, whose page
manager keeps every state that it ever made: each visit would add to host memory; and AdEMAMix, whose state is a
matrix that moments.py cannot cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_fsdp_qlora.distributed import rank
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.rotary.active import ActiveSet, ActiveSlice
from hf_fsdp_qlora.rotary.moments import OPTIMIZER_BLOCK, Moments, gather_states, split_state

PIECE_ELEMENTS = 2**24
"""Weights that are stepped in float32 at once. A multiple of every blockwise optimizer's block."""
SUPPORTED = (
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "lion_32bit", "lion_8bit", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "sgd", "adagrad", "rmsprop",
)  # fmt: skip
"""transformers' names of optimizers that treat every weight by itself, or in blocks of consecutive ones."""


def inner_optimizer(args: TrainingArguments) -> tuple[type, dict[str, Any]]:
    """The optimizer that `optim` and its companions ask for, as the Trainer would make it.

    Raises:
        ConfigError: one that does not work on flat slices.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name not in SUPPORTED:
        raise ConfigError(
            f"optim={name!r} cannot train flat slices of a weight that come and go. Use one of {', '.join(SUPPORTED)}."
        )
    return Trainer.get_optimizer_cls_and_kwargs(args)


@dataclass(eq=False)
class _Piece:
    """A run of an active slice as the inner optimizer knows it: `key` is its parameter, filled for a step."""

    active: ActiveSlice
    group: int
    start: int
    stop: int
    key: nn.Parameter

    @property
    def numel(self) -> int:
        return self.stop - self.start


class RotaryOptimizer(torch.optim.Optimizer):
    """What `Rotary.optimizer` makes the trainer build.

    Args:
        params: groups of parameters as the trainer makes them, all rotary parameters together.
        active: where the slices are.
        moments: of parameters that are not active.
        optimizer_cls: the inner optimizer's class.
        seed: of stochastic rounding.
        kwargs: for the inner optimizer.

    Attributes:
        step_number: how many steps were made before, by any process of this run; seeds the rounding.
        learning_rate_factor: multiplies the learning rate of every group, see `RotaryConfig.warmup_steps`.

    Raises:
        ConfigError: the trainer's parameters are not exactly the rotary ones.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        active: ActiveSet,
        moments: Moments,
        optimizer_cls: type[torch.optim.Optimizer],
        seed: int,
        **kwargs: Any,
    ) -> None:
        groups = list(params)
        self._inner = optimizer_cls([{**group, "params": []} for group in groups], **kwargs)
        settings = [_settings(group) for group in self._inner.param_groups]
        super().__init__([{**own, "params": list(g["params"])} for own, g in zip(settings, groups, strict=True)], {})
        self._active = active
        self._moments = moments
        self._pieces: dict[str, list[_Piece]] = {}
        self._group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        self._seed = seed
        self.step_number = 0
        self.learning_rate_factor = 1.0
        strangers = set(self._group_of) ^ {id(owner.parameter) for owner in active.parameters.values()}
        if strangers:
            raise ConfigError(
                f"{len(strangers)} parameters require gradients and are not trained in turn, or the reverse. "
                "prepare_rotary() sets requires_grad; do not change it, and do not add parameters after it."
            )

    def adopt(self, names: Iterable[str]) -> None:
        """Begin to train parameters that were just activated, with the moments that were kept for them."""
        for name in names:
            active = self._active.slices[name]
            pieces = list(self._cut(active))
            self._pieces[name] = pieces
            state = self._moments.take(name, self._active.device)
            for piece, own in zip(pieces, split_state(state, [piece.numel for piece in pieces]), strict=True):
                if own:
                    self._inner.state[piece.key] = self._with_counters(own, piece.group)

    def retire(self, names: Iterable[str], *, keep: bool) -> None:
        """Stop training parameters that are about to be parked, and free their moments: parking has that room.

        Args:
            keep: their moments, on the host.
        """
        for name in names:
            if keep:
                self._moments.put(name, self._state_of(name))
            for piece in self._pieces.pop(name):
                self._inner.state.pop(piece.key, None)

    def moments(self) -> dict[str, dict[str, Any]]:
        """The inner optimizer's state of each active parameter, over this rank's slice: not a copy, so in `Parts`
        where it steps in pieces."""
        return {name: self._state_of(name) for name in self._pieces}

    def state_bytes(self) -> int:
        """Memory of the inner optimizer's states."""
        states = self._inner.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the active parameters from their gradients. Collective.

        Raises:
            ConfigError: a closure is given.
        """
        if closure is not None:
            raise ConfigError("Rotary training cannot evaluate a closure again in a step. Use an optimizer without.")
        for inner, outer in zip(self._inner.param_groups, self.param_groups, strict=True):
            inner.update(_settings(outer))
            inner["lr"] = outer["lr"] * self.learning_rate_factor
        generator = torch.Generator(self._active.device)
        generator.manual_seed((self._seed * 1_000_003 + self.step_number) * 65_537 + rank())
        # In the order of the model, not of adoption: a resumed run must draw the same numbers for the same weights.
        pieces = [piece for name in self._active.parameters if name in self._pieces for piece in self._pieces[name]]
        for batch in _batches([piece for piece in pieces if piece.active.gradient() is not None]):
            self._step(batch, generator)
        self.step_number += 1
        self._active.gather()

    def _step(self, batch: list[_Piece], generator: torch.Generator) -> None:
        for piece in batch:
            gradient = piece.active.gradient()
            assert gradient is not None
            piece.key.data = piece.active.values[piece.start : piece.stop].float()
            piece.key.grad = gradient[piece.start : piece.stop].float()
        for index, group in enumerate(self._inner.param_groups):
            group["params"] = [piece.key for piece in batch if piece.group == index]
        self._inner.step()
        for piece in batch:
            if not piece.active.is_view:
                piece.active.write(piece.key.data, piece.start, generator)
            piece.key.data, piece.key.grad = piece.key.data.new_empty(0), None

    def _with_counters(self, state: dict[str, Any], group: int) -> dict[str, Any]:
        """torch's optimizers count steps in a tensor on the CPU, the fused and capturable ones on the device."""
        settings = self._inner.param_groups[group]
        if settings.get("fused") or settings.get("capturable"):
            return state
        return {key: v.cpu() if isinstance(v, Tensor) and v.dim() == 0 else v for key, v in state.items()}

    def _cut(self, active: ActiveSlice) -> Iterator[_Piece]:
        numel = active.values.numel()
        count = 1 if active.is_view else -(-numel // PIECE_ELEMENTS)
        # Equal pieces: bitsandbytes keeps 32-bit states for small ones, which would not fit together with the others.
        size = max(1, -(-numel // max(1, count) // OPTIMIZER_BLOCK)) * OPTIMIZER_BLOCK
        for start in range(0, numel, size):
            key = nn.Parameter(torch.empty(0, device=self._active.device), requires_grad=False)
            group = self._group_of[id(active.owner.parameter)]
            yield _Piece(active, group, start, min(start + size, numel), key)

    def _state_of(self, name: str) -> dict[str, Any]:
        pieces = self._pieces[name]
        states = [self._inner.state.get(piece.key, {}) for piece in pieces]
        return gather_states(states, [piece.numel for piece in pieces])


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _batches(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Views all at once, as stock optimizers take them; copies so many that they stay small."""
    views = [piece for piece in pieces if piece.active.is_view]
    if views:
        yield views
    batch: list[_Piece] = []
    for piece in pieces:
        if piece.active.is_view:
            continue
        if batch and sum(other.numel for other in batch) + piece.numel > PIECE_ELEMENTS:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch
