"""Choices per decoder layer that trade memory, compile time and speed: compiling it, and recomputing it.

`compile_layers` compiles each decoder layer by itself. The layers of a model run the same code, so one compilation
serves all of them, and what is outside (embedding, head, the trainer) stays as it is.

An `activation_budget` lets the compiler choose what a layer recomputes in its backward, in place of the checkpointing
around it: with a budget of 0 only the layer's input is kept, as with checkpointing, but what no gradient needs (the
last product of the MLP, a quarter of the work) is not computed again, and backward stays one compiled piece; with 1
nothing expensive is recomputed. In between, the products that save most time per byte are kept.

`limit_checkpointing` recomputes the activations of the first layers only, as many as asked for. The last layers keep
theirs: backward frees these first, before the first recomputation needs room for its own.

Left out: compiling under FSDP, whose hooks inside the layers break every graph; compiling generation, which stays
eager; replaying layers as CUDA graphs, which was slower and took more memory (benchmarks/NOTES_speed.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_fsdp_qlora.engine import Engine
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.quantization import triton_lacks


def set_layer_options(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    *,
    engine: Engine,
    compiled: bool,
    checkpointed: int | None,
    activation_budget: float | None = None,
) -> None:
    """What `load_model` does with the arguments of these names, on a model that may still be on meta.

    Raises:
        ConfigError: see the functions below; or layers are to be compiled under FSDP or where Triton cannot run, or
            options do not go together.
    """
    _check_budget(compiled, checkpointed, activation_budget)
    if activation_budget is not None:
        checkpointed = 0
    if compiled:
        if engine in ("fsdp1", "fsdp2"):
            raise ConfigError(
                f"compile_layers=True under {engine}: its hooks inside the decoder layers break every graph. Leave "
                "compile_layers out, or train on one GPU or under DDP."
            )
        lacks = triton_lacks() if torch.cuda.is_available() else None
        if lacks is not None:
            raise ConfigError(
                f"compile_layers=True, but Triton cannot launch kernels here: {lacks}; or leave compile_layers and "
                "activation_budget out."
            )
        compile_layers(layers, activation_budget=activation_budget)
        patched: Any = model
        patched.generate = partial(_generate_eagerly, patched.generate)
    if checkpointed is not None:
        limit_checkpointing(model, layers, checkpointed)


def compile_layers(layers: Sequence[nn.Module], *, activation_budget: float | None = None) -> None:
    """Compile each layer in place; the first training step pays for it.

    Under DDP torch would cut every graph where a bucket of gradients is full, the first at 1 MiB, so that reducing can
    begin inside the graph. Of a layer that would make two, and what passes between them would be kept for backward.
    DDP reduces layer by layer as it is, so that is switched off, for the process.

    Args:
        layers: the decoder layers.
        activation_budget: 0 to 1, how much of what a layer's backward could keep is kept; None leaves that to
            checkpointing around the layer.
    """
    torch._dynamo.config.optimize_ddp = False
    if activation_budget is None:
        for layer in layers:
            layer.compile()
        return
    backend = LayerCompiler(activation_budget)
    for layer in layers:
        layer.compile(backend=backend)


def _generate_eagerly(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Generate with layers as they were: the cache of each layer would make another graph of the one code that all
    layers run, and after eight graphs torch stops compiling it; training that begins later would be eager."""
    with torch.compiler.set_stance("force_eager"):
        return generate(*args, **kwargs)


class LayerCompiler:
    """`torch.compile`'s own backend with a memory budget; one object for all layers, so that they share compilations.

    Args:
        activation_budget: torch's `activation_memory_budget`, which is a setting of the process: here it holds while
            a layer is compiled.
    """

    def __init__(self, activation_budget: float) -> None:
        self.activation_budget = activation_budget

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile one graph, as dynamo asks a backend to.

        Raises:
            ConfigError: the layer has dropout, and less than everything is to be kept.
        """
        if self.activation_budget < 1 and _has_dropout(graph):
            raise ConfigError(
                f"activation_budget={self.activation_budget} in a layer with dropout: what is computed again would "
                "drop other values than forward did. Set lora_dropout and the model's own dropout to 0, or "
                "activation_budget=1."
            )
        inductor: Any = torch._dynamo.lookup_backend("inductor")
        with functorch_config.patch(activation_memory_budget=self.activation_budget):
            return inductor(graph, inputs)


def _has_dropout(graph: torch.fx.GraphModule) -> bool:
    """Whether the forward that dynamo saw draws random numbers; dropout in eval mode, or of 0, does not."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    attention = any(node.kwargs.get("dropout_p", 0) for node in calls)
    return attention or any(
        node.target is nn.functional.dropout and node.args[1] > 0 and node.args[2] for node in calls
    )


def _check_budget(compiled: bool, checkpointed: int | None, activation_budget: float | None) -> None:
    if activation_budget is not None and not 0 <= activation_budget <= 1:
        raise ConfigError(
            f"activation_budget={activation_budget} is a share of a layer's activations. Use 0 (keep each layer's "
            "input only) to 1 (recompute nothing expensive)."
        )
    if activation_budget is not None and not compiled:
        raise ConfigError(
            f"activation_budget={activation_budget} without compile_layers: the compiler keeps to it. Set "
            "compile_layers=True, or use checkpoint_layers."
        )
    if activation_budget is not None and checkpointed is not None:
        raise ConfigError(
            f"activation_budget={activation_budget} and checkpoint_layers={checkpointed} both say what is recomputed. "
            "Leave one of them out."
        )


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
