"""The Trainer's estimate of floating-point operations, with the parameters counted once, when the model was loaded.

transformers counts them anew at every step, by name, over all modules. That is 13 to 29 ms of Python for 32 layers
(`--profile` of benchmarks/training_speed.py). Rows of bytes would moreover count as the words they are stored in, and
not as the weights they stand for.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import Trainer

from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.trainer_compat.model import attachment


def patched_floating_point_ops(stock: Any) -> Any:
    """6 FLOP per token and parameter outside the embeddings, as stock estimates them. Can go when transformers does
    not count at every step (`Trainer.floating_point_ops`, 5.23)."""

    @functools.wraps(stock)
    def floating_point_ops(trainer: Trainer, inputs: dict[str, Any]) -> int:
        attached = attachment(trainer.model)
        if attached is None:
            return stock(trainer, inputs)
        tokens = inputs.get(getattr(trainer.model, "main_input_name", "input_ids"))
        return 0 if tokens is None else 6 * tokens.numel() * attached.num_weights

    return floating_point_ops


def num_weights(model: nn.Module) -> int:
    """The parameters of a model and its adapters without embeddings, quantised weights as what they stand for.

    A parameter that several modules share counts once, and not at all if one of them is an embedding, as in
    transformers' `num_parameters`.
    """
    counted = {parameter for module in model.modules() if isinstance(module, nn.Embedding)
               for parameter in module.parameters(recurse=False)}  # fmt: skip
    total = 0
    for module in model.modules():
        own = {parameter for parameter in module.parameters(recurse=False) if parameter not in counted}
        if isinstance(module, QuantizedLinear):
            own -= {module.weight, module.weight_stats, module.dense}
            total += module.in_features * module.out_features
        total += sum(parameter.numel() for parameter in own)
        counted |= own
    return total
