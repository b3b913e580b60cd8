"""What lies outside the decoder layers: the input embedding and the tail (final norm and head), and where else than in
shards they can be.

A large vocabulary makes them the largest matrices of a model. FSDP2 gathers each of them through a buffer, so that a
step holds a head H twice while it is fetched and once until its backward is over, and an embedding E twice at the
beginning. Two ways out, for frozen ones:

- `replicate_head`: the tail stays whole on every rank. It costs H all the time, in place of its shard and of the two
  copies at the highest moments, and nothing is gathered.
- `embedding_on_host`: the embedding stays whole in ordinary host memory, once per rank. Ids are looked up there and
  only the tokens' vectors are copied to the device; a micro-batch waits for its ids to reach the host.

Left out: tied embeddings (the head needs them on the device), trained ones (their gradients would not be reduced), and
embedding classes that do more than look up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_fsdp_qlora.errors import ConfigError

WholeParameters = dict[nn.Parameter, torch.device]
"""Parameters that are not sharded, and where they live."""


def outside_layers(model: nn.Module, layers: Sequence[nn.Module]) -> tuple[nn.Module | None, list[nn.Module]]:
    """The input embedding, if it shares nothing with the rest, and the other modules outside the decoder layers."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside: list[nn.Module] = []

    def collect(module: nn.Module) -> None:
        for child in module.children():
            if id(child) in inside:
                continue
            if any(id(part) in inside for part in child.modules()):
                collect(child)
            elif any(True for _ in child.parameters()):
                outside.append(child)

    collect(model)
    embedding = next((module for module in outside if _holds(module, model.get_input_embeddings())), None)  # type: ignore[operator]
    if embedding is None:
        return None, outside
    others = [module for module in outside if module is not embedding]
    shared = {id(p) for p in embedding.parameters()} & {id(p) for module in others for p in module.parameters()}
    return (None, outside) if shared or not others else (embedding, others)


def keep_whole(
    model: nn.Module,
    layers: Sequence[nn.Module],
    device: torch.device,
    *,
    replicate_head: bool,
    embedding_on_host: bool,
) -> WholeParameters:
    """Decide which parameters FSDP2 leaves alone, and make the embedding look up where it will be.

    Args:
        model: on meta, with its adapter.
        layers: the decoder layers.
        device: where the model computes.

    Raises:
        ConfigError: what should stay whole is trained, tied, or no plain embedding.
    """
    if not (replicate_head or embedding_on_host):
        return {}
    embedding, tail = outside_layers(model, layers)
    if embedding is None:
        raise ConfigError(
            "The head is tied to the input embedding, which is needed at both ends of a step. Leave replicate_head "
            "and embedding_on_host out: one shard of one matrix is what there is."
        )
    whole: WholeParameters = {}
    if replicate_head:
        _check_frozen(model, tail, "replicate_head")
        whole |= {parameter: device for module in tail for parameter in module.parameters()}
    if embedding_on_host:
        _check_frozen(model, [embedding], "embedding_on_host")
        if type(embedding) is not nn.Embedding:
            raise ConfigError(
                f"embedding_on_host looks ids up in a plain nn.Embedding, got {type(embedding).__name__}, which "
                "computes more than that. Leave it out."
            )
        whole |= dict.fromkeys(embedding.parameters(), torch.device("cpu"))
        embedding.register_forward_pre_hook(_ids_to_host)
        embedding.register_forward_hook(functools.partial(_vectors_to, device))
    return whole


def _check_frozen(model: nn.Module, modules: Sequence[nn.Module], option: str) -> None:
    ours = {id(parameter) for module in modules for parameter in module.parameters()}
    trained = [
        name for name, parameter in model.named_parameters() if id(parameter) in ours and parameter.requires_grad
    ]
    if trained:
        raise ConfigError(
            f"{option} keeps parameters out of FSDP2, which would not reduce their gradients, and {trained[0]} is "
            f"trained. Leave {option} out, or take it out of modules_to_save (without an adapter all are trained)."
        )


def _ids_to_host(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(ids.to("cpu") for ids in args)


def _vectors_to(device: torch.device, _: nn.Module, __: Any, vectors: Tensor) -> Tensor:
    return vectors.to(device)


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(candidate is part for candidate in module.modules())
