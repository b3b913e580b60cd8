"""A second evaluation, on the weights that will be saved, where a method trains the model on rounded ones.

The Trainer evaluates the model it holds. A `FullTraining` that asks for it is evaluated once more, and both losses are
logged and returned: `eval_loss` and `eval_masters_loss`. Best-model selection can go by either.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer

from hf_fsdp_qlora.trainer_compat.full_training import full_training

MASTERS = "masters"


def patched_evaluate(stock: Any) -> Any:
    """Evaluate twice. A dictionary of data sets comes back here once for each of them."""

    @functools.wraps(stock)
    def evaluate(
        trainer: Trainer, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = stock(trainer, eval_dataset, ignore_keys, metric_key_prefix)
        training = full_training(trainer.model)
        several = isinstance(trainer.eval_dataset if eval_dataset is None else eval_dataset, dict)
        exact = None if training is None or several else training.exact_weights()
        if exact is not None:
            with exact:
                metrics.update(stock(trainer, eval_dataset, ignore_keys, f"{metric_key_prefix}_{MASTERS}"))
        return metrics

    return evaluate
