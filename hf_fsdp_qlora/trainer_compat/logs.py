"""How a callback adds values to the trainer's logs.

`Trainer.log` writes `log_history` and lets the reporters (TensorBoard, W&B, the progress bar) run before any callback
of the user sees the values, so whatever a callback adds in `on_log` reaches neither. `Trainer.log` is therefore
replaced by one that first asks every `LogSource` among the callbacks; without one it is the stock method.

Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/trainer.py (`log`). Can go when
callbacks can add to `logs` before they are reported.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState


class LogSource(TrainerCallback, ABC):
    """A callback with values for the training logs."""

    @abstractmethod
    def log_values(self, state: TrainerState, logs: dict[str, float]) -> dict[str, float]:
        """Values to add to `logs`, which holds what the trainer reports for this step (it has "loss").

        Called on every rank, but must not communicate: `trainer.log` may also be called on one rank alone.
        """


def with_log_sources(stock_log: Any) -> Any:
    """The replacement of `Trainer.log`."""

    @functools.wraps(stock_log)
    def log(trainer: Trainer, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # training steps, not evaluations and summaries
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, LogSource):
                    logs.update(callback.log_values(trainer.state, logs))
        stock_log(trainer, logs, *args, **kwargs)

    return log
