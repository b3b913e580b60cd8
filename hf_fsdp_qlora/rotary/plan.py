"""The blocks of a model that take turns: which parameters train together, and how many blocks at once.

Every parameter is in exactly one block, so that one sweep over the blocks trains everything equally often:

- a decoder layer, or its attention and its MLP apart, with their biases and norms;
- the embedding, the head, and the final norm, each a block of its own; tied, embedding and head are one.

Blocks are in the order of the forward pass, so "the lowest active block" is the first one of them.

Left out: training a part of an embedding's rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.rotary.config import ActiveLimit, Split
from hf_fsdp_qlora.skeleton import decoder_layers

Kind = Literal["embedding", "layer", "attention", "mlp", "norm", "head"]

MOMENT_BYTES = 8
"""Of Adam's two fp32 moments; 8-bit optimizers take 2. For "active" as a size the larger is assumed."""

_ATTENTION = ("attn", "attention", "input_layernorm")
"""How the names of a decoder layer's children end that belong to its first half."""


@dataclass(frozen=True)
class Block:
    """Parameters that are active together.

    Args:
        name: for logs and checkpoints, "layer 3" or "layer 3 mlp".
        kind: what it is.
        parameters: their names in the checkpoint as the model has it; tied ones have one.
        numel: weights in them.
    """

    name: str
    kind: Kind
    parameters: tuple[str, ...]
    numel: int


@dataclass(frozen=True)
class Plan:
    """Blocks in the order of the forward pass, and the limit on those active at once.

    Args:
        blocks: all of them.
        always: indices of those that are active in every visit.
        rotating: indices of the others.
        max_blocks: of rotating blocks at once, or None.
        max_numel: weights active at once, those of `always` included, or None.
    """

    blocks: tuple[Block, ...]
    always: tuple[int, ...]
    rotating: tuple[int, ...]
    max_blocks: int | None = None
    max_numel: int | None = None

    @property
    def numel(self) -> int:
        """Weights of the model."""
        return sum(block.numel for block in self.blocks)

    def numel_of(self, indices: Sequence[int]) -> int:
        """Weights in these blocks."""
        return sum(self.blocks[index].numel for index in indices)

    @property
    def largest_visit(self) -> int:
        """Weights that the rotating blocks of no visit exceed, in whatever order they come."""
        sizes = sorted((self.blocks[index].numel for index in self.rotating), reverse=True)
        largest = sum(sizes[: self.max_blocks])
        if self.max_numel is not None:
            largest = min(largest, max(sizes[0], self.max_numel - self.numel_of(self.always)))
        return largest

    def take(self, order: Sequence[int]) -> tuple[int, ...]:
        """As many of the first rotating blocks of `order` as may be active at once, and never less than one."""
        count, total = 0, self.numel_of(self.always)
        for index in order:
            total += self.blocks[index].numel
            too_many = self.max_blocks is not None and count >= self.max_blocks
            too_large = self.max_numel is not None and total > self.max_numel
            if count and (too_many or too_large):
                break
            count += 1
        return tuple(order[:count])

    def visits(self, order: Sequence[int]) -> list[tuple[int, ...]]:
        """Cut a sweep over the rotating blocks into visits."""
        visits, rest = [], tuple(order)
        while rest:
            visits.append(self.take(rest))
            rest = rest[len(visits[-1]) :]
        return visits


def make_plan(
    blocks: Sequence[Block], *, limit: ActiveLimit, always_active: Sequence[str], bytes_per_active: int
) -> Plan:
    """Decide which blocks rotate and how much of them is active at once.

    Args:
        blocks: of `plan_blocks`.
        limit: see `ActiveLimit`.
        always_active: kinds of blocks that do not rotate. A head that is tied is part of the embedding.
        bytes_per_active: what a weight costs on the device only while it is active, see `active_bytes`.

    Raises:
        ConfigError: no block is left to rotate.
    """
    always = tuple(index for index, block in enumerate(blocks) if block.kind in always_active)
    rotating = tuple(index for index in range(len(blocks)) if index not in always)
    if not rotating:
        raise ConfigError(f"always_active={list(always_active)} leaves no block to rotate. Remove one of them.")
    numel = sum(block.numel for block in blocks)
    max_numel = None
    if limit.fraction is not None:
        max_numel = int(limit.fraction * numel)
    if limit.num_bytes is not None:
        max_numel = limit.num_bytes // bytes_per_active
    return Plan(tuple(blocks), always, rotating, max_blocks=limit.blocks, max_numel=max_numel)


def active_bytes(weight_bytes: int, master_bytes: int) -> int:
    """Device bytes of one active weight: itself, its gradient, Adam's moments, and its master where that is wider.

    Args:
        weight_bytes: item size of the model's dtype.
        master_bytes: item size of the masters.
    """
    return 2 * weight_bytes + MOMENT_BYTES + (master_bytes if master_bytes != weight_bytes else 0)


def plan_blocks(model: PreTrainedModel, shapes: Mapping[str, Sequence[int]], split: Split) -> tuple[Block, ...]:
    """The blocks of a model, without its weights being looked at.

    Args:
        model: for its structure.
        shapes: of every tensor of the checkpoint by the model's name for it, tied ones under one name. Buffers are
            passed over.
        split: see `RotaryConfig`.

    Raises:
        ConfigError: the model names no decoder layers, or a layer has no attention to split off.
    """
    modules = dict(model.named_modules())
    numbers = {id(layer): number for number, layer in enumerate(decoder_layers(model))}
    layers = {name: numbers[id(module)] for name, module in modules.items() if id(module) in numbers}
    sections: dict[tuple[str, Kind], dict[str, int]] = {}
    for name, shape in shapes.items():
        path, _, own_name = name.rpartition(".")
        if own_name in modules[path]._buffers:
            continue
        layer = next((prefix for prefix in layers if name.startswith(prefix + ".")), None)
        if layer is None:
            kind = _kind_outside(model, modules[path])
            section: tuple[str, Kind] = (kind, kind)
        else:
            section = _section(f"layer {layers[layer]}", name.removeprefix(layer + "."), split)
        sections.setdefault(section, {})[name] = math.prod(shape)
    if split == "attention_mlp":
        _check_halves([kind for _, kind in sections], len(layers))
    blocks = [Block(name, kind, tuple(of), sum(of.values())) for (name, kind), of in sections.items()]
    return tuple(sorted(blocks, key=_forward_position))


def _section(layer: str, name_in_layer: str, split: Split) -> tuple[str, Kind]:
    if split == "layer":
        return layer, "layer"
    if name_in_layer.split(".")[0].endswith(_ATTENTION):
        return f"{layer} attention", "attention"
    return f"{layer} mlp", "mlp"


def _kind_outside(model: PreTrainedModel, owner: nn.Module) -> Kind:
    """The kind of a parameter that is in no decoder layer."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(owner, nn.Embedding) or (owner is head and head.weight is embedding.weight):
        return "embedding"
    return "head" if owner is head else "norm"


def _check_halves(kinds: Sequence[Kind], num_layers: int) -> None:
    if kinds.count("attention") != num_layers or kinds.count("mlp") != num_layers:
        raise ConfigError(
            "split='attention_mlp' needs an attention in every decoder layer, in a module whose name ends in 'attn' "
            "or 'attention'. Use split='layer' for this model."
        )


def _forward_position(block: Block) -> tuple[int, int, int]:
    if block.kind in ("embedding", "norm", "head"):
        return ({"embedding": 0, "norm": 2, "head": 3}[block.kind], 0, 0)
    return (1, int(block.name.split()[1]), int(block.kind == "mlp"))
