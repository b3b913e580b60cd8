"""What a rank holds beside its own shards at each moment of a step: gathered parameters and buffers of collectives.

All whole: U is one decoder layer's frozen weights, E the input embedding, H the tail (final norm, head, and the
embedding where the two are tied), R everything outside the decoder layers, A the adapters of one layer in the compute
dtype.

| engine | embedding fetched | forward of a layer | head fetched | head forward | head backward, norm | last layer | first layer |
| --- | --- | --- | --- | --- | --- | --- | --- |
| none, DDP | 0 | 0 | 0 | 0 | 0 | 0 | 0 |
| FSDP2, one rank | E | U | H | H | H | U | U |
| FSDP2, rows | 2E | 2U | 2H + U | 2H | H | U + A | U |
| FSDP2, 16-bit weights | 2E | 2U | 2H + U | 2H | H | 2U + A | U |
| FSDP2, rotary | 0 | U, 2U with several ranks | 0 | 0 | 0 | U | U |
| FSDP1, one rank | 0 | 0 | 0 | 0 | 0 | 0 | 0 |
| FSDP1 | R | R + U | R | R | R + U | R + U | R + U |

What is fetched is there twice with one rank too if it is copied from the host or cast. With `replicate_head` H is 0, and
from the end of the last layer to that of the root's forward there is the last layer's buffer (A, with 16-bit weights
U + A); with `embedding_on_host` E is 0. A trained embedding is gathered beside the first layer.

Why, for FSDP2 (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py): with one rank nothing travels, and a group's
shards are copied into its whole parameters when it runs. With several, a group is gathered into one buffer and copied
out of it; in forward the buffer is kept until the next group has been copied out, and for the last group, the tail,
until the root's forward ends, which is after the loss. In backward the buffer goes at once, and only the group before
is fetched ahead. Rows are a group of their own, in the order rows 0, layer 0, rows 1, layer 1,
...: ahead of rows comes the small rest of the layer before, so two layers' rows are never there together; but 16-bit
weights are in the layer's own group. Before the rows of layer 0 comes the embedding, which backward does not need: a
frozen one is not fetched there (sharding.py).
The tail is freed by the backward of the final norm, before the decoder layers'.

FSDP1 gathers into place, with no buffer; its root unit, everything outside the decoder layers, stays whole from
forward to the end of backward, which begins by fetching the last layer. Later ones are fetched when their successor's
activations are nearly gone. With one rank it shards nothing.

Under FSDP2, also with one rank, backward has the gradients of the layer's trained parameters in the compute dtype too,
and their reduction's input in float32.

Checked on the CPU by following every allocation of steps on one and two gloo ranks (FSDP2) and on two (FSDP1).
"""  # noqa: E501

from __future__ import annotations

from dataclasses import replace

from hf_fsdp_qlora.activations import (
    EMBEDDING_MOMENT,
    FIRST_LAYER_MOMENT,
    FORWARD_MOMENT,
    HEAD_FETCH_MOMENT,
    HEAD_FORWARD_MOMENT,
    HEAD_MOMENT,
    LAYER_MOMENT,
    NORM_MOMENT,
)
from hf_fsdp_qlora.memory_settings import DTYPE_BYTES, MemorySettings, row_format, trainable_parameters, whole_numel
from hf_fsdp_qlora.model_shape import ModelShape


def gathered_bytes(shape: ModelShape, settings: MemorySettings) -> dict[str, int]:
    """Bytes by moment. See the table above."""
    moments = (EMBEDDING_MOMENT, FORWARD_MOMENT, HEAD_FETCH_MOMENT, HEAD_FORWARD_MOMENT, HEAD_MOMENT, NORM_MOMENT,
               LAYER_MOMENT, FIRST_LAYER_MOMENT)  # fmt: skip
    if not settings.engine.startswith("fsdp"):
        return dict.fromkeys(moments, 0)
    dtype, several = DTYPE_BYTES[settings.dtype], settings.shards > 1
    layer, reducing = layer_weight_bytes(shape, settings), _reducing_bytes(shape, settings)
    if settings.method == "rotary":  # FSDP has the rows alone
        forward = 2 * layer if several else layer
        return dict(zip(moments, (0, forward, 0, 0, 0, 0, layer, layer), strict=True))
    embedding, tail = _outside_bytes(shape, settings)
    if settings.engine == "fsdp1":
        root = (tail + embedding) if several else 0
        layer = layer if several else 0
        # Units of adapters are reduced one by one: no buffer worth counting.
        return dict(zip(moments, (root, root + layer, root, root, *[root + layer] * 4), strict=True))
    copied = settings.offload == "all" or bool(settings.modules_to_save) or settings.method == "full"
    if not several:
        copies = 2 if copied else 1
        backward = layer + reducing
        return dict(zip(moments, (copies * embedding, layer, copies * tail, tail, tail, tail, backward, backward),
                        strict=True))  # fmt: skip
    ahead = _trained_layer_numel(shape, settings) * dtype + (0 if row_format(settings) is not None else layer)
    trained = {"embed_tokens", "embed_in"} & set(settings.modules_to_save) or not settings.has_adapters
    again = embedding if trained else 0
    fetched, forward = (2 * tail + layer, 2 * tail) if tail else (ahead, ahead)
    return dict(zip(moments, (2 * embedding, 2 * layer, fetched, forward, tail, tail, layer + ahead + reducing,
                              layer + again + reducing), strict=True))  # fmt: skip


def _outside_bytes(shape: ModelShape, settings: MemorySettings) -> tuple[int, int]:
    """What is gathered of the input embedding and of the tail, whole; a tied embedding is part of the tail."""
    dtype = DTYPE_BYTES[settings.dtype]
    whole_tail, whole_embedding = whole_numel(shape, settings)
    embedding = shape.embedding_numel - whole_embedding
    tail = shape.head_numel + shape.outside_other_numel - whole_tail
    if not shape.head_numel:
        tail, embedding = tail + embedding, 0
    return embedding * dtype, tail * dtype


def gathered_row_bytes(shape: ModelShape, settings: MemorySettings) -> int:
    """The rows of one layer as the check after loading gathers them: whole, and with several ranks in a buffer too."""
    if settings.engine != "fsdp2" or row_format(settings) is None:
        return 0
    return layer_weight_bytes(shape, settings) * (2 if settings.shards > 1 else 1)


def layer_weight_bytes(shape: ModelShape, settings: MemorySettings) -> int:
    """Frozen linear weights of one decoder layer, as they are stored, whole."""
    rows, dtype = row_format(settings), DTYPE_BYTES[settings.dtype]
    return sum(layer.numel * dtype if rows is None else rows.num_bytes(layer.numel) for layer in shape.linears)


def _trained_layer_numel(shape: ModelShape, settings: MemorySettings) -> int:
    """Trained parameters of one layer that FSDP holds; those of rotary training it does not."""
    if not settings.has_adapters:
        return 0 if settings.method == "rotary" else shape.layer_numel
    return trainable_parameters(shape, replace(settings, modules_to_save=())) // shape.num_layers


def _reducing_bytes(shape: ModelShape, settings: MemorySettings) -> int:
    return _trained_layer_numel(shape, settings) * (DTYPE_BYTES[settings.dtype] + 4)
