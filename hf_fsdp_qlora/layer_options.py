"""Two choices per decoder layer that trade memory, compile time and speed: compiling it, and recomputing it.

`compile_layers` compiles each decoder layer by itself. The layers of a model run the same code, so one compilation
serves all of them, and what is outside (embedding, head, the trainer) stays as it is.

`limit_checkpointing` recomputes the activations of the first layers only, as many as asked for. The last layers keep
theirs: backward frees these first, before the first recomputation needs room for its own.

Left out: compiling under FSDP, whose hooks inside the layers break every graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_fsdp_qlora.engine import Engine
from hf_fsdp_qlora.errors import ConfigError


def set_layer_options(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    *,
    engine: Engine,
    compiled: bool,
    checkpointed: int | None,
) -> None:
    """What `load_model` does with `compile_layers` and `checkpoint_layers`, on a model that may still be on meta.

    Raises:
        ConfigError: see the two functions; or layers are to be compiled under FSDP.
    """
    if compiled:
        if engine in ("fsdp1", "fsdp2"):
            raise ConfigError(
                f"compile_layers=True under {engine}: its hooks inside the decoder layers break every graph. Leave "
                "compile_layers out, or train on one GPU or under DDP."
            )
        compile_layers(layers)
    if checkpointed is not None:
        limit_checkpointing(model, layers, checkpointed)


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compile each layer in place; the first training step pays for it.

    Args:
        layers: the decoder layers.
    """
    for layer in layers:
        layer.compile()


def limit_checkpointing(model: PreTrainedModel, layers: Sequence[nn.Module], count: int) -> None:
    """Let gradient checkpointing, once someone enables it, recompute the first `count` layers only.

    Args:
        model: the transformers model; changed in place.
        layers: its decoder layers, in order.
        count: how many are recomputed in backward; the others keep their activations.

    Raises:
        ConfigError: `count` is not between 0 and the number of layers, or the layers cannot be told apart.
    """
    if not 0 <= count <= len(layers):
        raise ConfigError(f"checkpoint_layers={count}: the model has {len(layers)} decoder layers.")
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise ConfigError(
            f"checkpoint_layers={count}: the layers of {type(model).__name__} have no checkpointing of their own "
            "(transformers' GradientCheckpointingLayer). Leave checkpoint_layers out; gradient_checkpointing then "
            "recomputes all of them."
        )
    # The one method behind `gradient_checkpointing_enable` and `_disable`, for this instance alone.
    model._set_gradient_checkpointing = partial(  # type: ignore[method-assign]
        _set_some, model._set_gradient_checkpointing, layers[count:]
    )


def _set_some(set_all: Callable[..., None], kept: Sequence[nn.Module], *args: Any, **kwargs: Any) -> None:
    set_all(*args, **kwargs)
    for layer in kept:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
