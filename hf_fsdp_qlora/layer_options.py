"""Choices per decoder layer that trade memory, compile time and speed: compiling it, and recomputing it.

`compile_layers` compiles each decoder layer by itself. The layers of a model run the same code, so one compilation
serves all of them, and what is outside (embedding, head, the trainer) stays as it is.

An `activation_budget` lets the compiler choose what a layer recomputes in its backward, in place of the checkpointing
around it: with a budget of 0 only the layer's input is kept, as with checkpointing, but what no gradient needs (the
last product of the MLP, a quarter of the work) is not computed again, and backward stays one compiled piece; with 1
nothing expensive is recomputed. In between, the products that save most time per byte are kept.

`cuda_graphs` records each compiled layer's forward and backward once and replays them: one launch in place of 60 to
150, which is what small batches wait for. The recordings own their memory, also that of the gradients they return, so
a pre-hook of the decoder starts a new round and first gives gradients that are being accumulated memory of their own.
Batches of another length run compiled, without recordings.

`limit_checkpointing` recomputes the activations of the first layers only, as many as asked for. The last layers keep
theirs: backward frees these first, before the first recomputation needs room for its own.

Left out: compiling under FSDP, whose hooks inside the layers break every graph.
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


def set_layer_options(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    *,
    engine: Engine,
    compiled: bool,
    checkpointed: int | None,
    activation_budget: float | None = None,
    cuda_graphs: bool = False,
) -> None:
    """What `load_model` does with the arguments of these names, on a model that may still be on meta.

    Raises:
        ConfigError: see the functions below; or layers are to be compiled under FSDP, or options do not go together.
    """
    _check_budget(compiled, checkpointed, activation_budget, cuda_graphs)
    if activation_budget is not None:
        checkpointed = 0
    if compiled:
        if engine in ("fsdp1", "fsdp2"):
            raise ConfigError(
                f"compile_layers=True under {engine}: its hooks inside the decoder layers break every graph. Leave "
                "compile_layers out, or train on one GPU or under DDP."
            )
        compile_layers(layers, activation_budget=activation_budget, cuda_graphs=cuda_graphs)
    if cuda_graphs:
        if engine != "none":
            raise ConfigError(
                f"cuda_graphs=True under {engine}: recorded layers have been tried in one process only. Leave "
                "cuda_graphs out."
            )
        model.base_model.register_forward_pre_hook(_begin_round)
    if checkpointed is not None:
        limit_checkpointing(model, layers, checkpointed)


def compile_layers(
    layers: Sequence[nn.Module], *, activation_budget: float | None = None, cuda_graphs: bool = False
) -> None:
    """Compile each layer in place; the first training step pays for it.

    Args:
        layers: the decoder layers.
        activation_budget: 0 to 1, how much of what a layer's backward could keep is kept; None leaves that to
            checkpointing around the layer.
        cuda_graphs: record and replay on CUDA. `_begin_round` must run before every forward.
    """
    if activation_budget is None and not cuda_graphs:
        for layer in layers:
            layer.compile()
        return
    backend = LayerCompiler(1.0 if activation_budget is None else activation_budget, cuda_graphs)
    for layer in layers:
        layer.compile(backend=backend)


class LayerCompiler:
    """`torch.compile`'s own backend with a memory budget; one object for all layers, so that they share compilations.

    Args:
        activation_budget: torch's `activation_memory_budget`, which is a setting of the process: here it holds while
            a layer is compiled.
        cuda_graphs: batches of other lengths than the first are compiled for all lengths and not recorded.
    """

    def __init__(self, activation_budget: float, cuda_graphs: bool) -> None:
        self.activation_budget = activation_budget
        self.options = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True} if cuda_graphs else {}

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
            return inductor(graph, inputs, config_patches=self.options)


def _has_dropout(graph: torch.fx.GraphModule) -> bool:
    """Whether the forward that dynamo saw draws random numbers; dropout in eval mode, or of 0, does not."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    attention = any(node.kwargs.get("dropout_p", 0) for node in calls)
    return attention or any(
        node.target is nn.functional.dropout and node.args[1] > 0 and node.args[2] for node in calls
    )


def _begin_round(model: nn.Module, args: Any) -> None:
    """Before a forward of recorded layers: what the last round returned is about to be overwritten.

    Gradients of the step before are gone by then; those that are left are being accumulated.
    """
    gradients = {each: each.grad for each in model.parameters() if each.grad is not None}
    if gradients:
        copies = torch._foreach_mul(list(gradients.values()), 1.0)
        for parameter, gradient in zip(gradients, copies, strict=True):
            parameter.grad = gradient
    torch.compiler.cudagraph_mark_step_begin()


def _check_budget(
    compiled: bool, checkpointed: int | None, activation_budget: float | None, cuda_graphs: bool
) -> None:
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
    if cuda_graphs and activation_budget is None:
        raise ConfigError(
            "cuda_graphs=True without activation_budget: layers recomputed from outside cannot be recorded. Set "
            "compile_layers=True and an activation_budget (0 keeps as little as gradient checkpointing, 1 everything)."
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
