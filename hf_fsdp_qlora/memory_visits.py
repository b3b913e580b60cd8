"""Which blocks rotary training may have active together, as far as memory depends on it. Arithmetic only.

The blocks are those of rotary/plan.py: each decoder layer, the embedding and the head (one, where they are tied), and
the final norm, which is always active. A visit takes blocks in the schedule's order until the limit is reached, and at
least one. In some visit of a random order, any of these come together: the embedding or not, the head or not, and as
many decoder layers as the limit then leaves room for. With fewer of them nothing takes more.

Which layers they are decides how far backward goes and what it keeps. The most expensive are the last one, whose
backward meets the inputs of all others, and the first, down to which backward goes; two or more can be both.

Left out: blocks of half a layer (`split="attention_mlp"`) and an embedding or a head that is always active.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from hf_fsdp_qlora.model_shape import ModelShape


@dataclass(frozen=True)
class Visit:
    """Blocks that are active together, and where.

    Attributes:
        embedding, head: whether they are among them. Tied, both are.
        layers: decoder layers among them.
        backward_layers: through how many decoder layers backward goes, from the last one down.
        trains_last, trains_first: whether the last and the first of those are active.
        outside_numel: active parameters outside the decoder layers.
        numel: active parameters.
    """

    embedding: bool
    head: bool
    layers: int
    backward_layers: int
    trains_last: bool
    trains_first: bool
    outside_numel: int
    numel: int


def rotary_visits(shape: ModelShape, active_fraction: float | None) -> tuple[Visit, ...]:
    """The visits that one of may take the most memory.

    Args:
        active_fraction: as in `RotaryConfig(active="10%")`, 0.1; None is one block at a time.
    """
    limit = int((active_fraction or 0) * shape.total_numel) - shape.outside_other_numel
    visits = []
    for embedding, head in product((False, True), repeat=2):
        if not shape.head_numel and embedding != head:
            continue
        outside = embedding * shape.embedding_numel + head * shape.head_numel
        blocks = (embedding + head) if shape.head_numel else int(embedding)
        if blocks > 1 and outside > limit:
            continue
        layers = min(shape.num_layers, max(0 if blocks else 1, (limit - outside) // shape.layer_numel))
        numel = shape.outside_other_numel + outside + layers * shape.layer_numel
        visits += [
            Visit(embedding, head, layers, *place, outside_numel=numel - layers * shape.layer_numel, numel=numel)
            for place in _places(shape.num_layers, layers, embedding)
        ]
    return tuple(visits)


def largest_visit_numel(shape: ModelShape, active_fraction: float | None) -> int:
    """Parameters that no visit exceeds."""
    return max(visit.numel for visit in rotary_visits(shape, active_fraction))


def _places(all_layers: int, layers: int, embedding: bool) -> list[tuple[int, bool, bool]]:
    """Where so many active layers may be: `backward_layers`, `trains_last`, `trains_first`."""
    if layers == 0:
        return [(all_layers if embedding else 0, False, False)]
    if layers > 1 or all_layers == 1:
        return [(all_layers, True, True)]
    return [(all_layers, False, True), (all_layers, True, False) if embedding else (1, True, True)]
