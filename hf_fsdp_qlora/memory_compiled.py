"""What compiled decoder layers keep for backward and need in it, by `activation_budget` (layer_options.py). Arithmetic.

Known for adapters over layers like Llama's (two norms, separate linear layers, gated MLP; with or without norms of
queries and keys), each computing alone; where those that read one input compute together: memory_joined.py. Letters as
in activations.py, K the width of keys or of values; W the largest dequantised weight of the MLP with its statistics, 0
for 16-bit weights. Every layer keeps its input (cTH). Beside it:

| budget | kept |
| --- | --- |
| 0 | nothing |
| 1, or no budget | cT (3H + 2Q + 2K + 3I): two normed inputs (where LoRA reads them), the residual, query, key, value, output of attention, gate, up and their product (likewise); with padding keys and values as wide as queries, and the mask in c (TS); with norms of queries and keys their inputs; the adapter in c |
| between | the outputs of products (Q, K, K, H, I, I) whose sum is the largest that is at most the budget times the row above; where there is room for all of them and for attention's output, that too |

The compiler keeps the products that save most time per byte within that room, so the largest sum is a bound, and for
six Llama shapes nearly always what it keeps. All but 0 keep the output of LoRA's A (cTr per layer), log-sum-exp, and norms' factors.

The peak of the layer's backward, with its input, the gradient that comes in and all that it kept (P is what is fused
into one kernel there: silu, its backward, and the product of gate and up):

| kept | peak |
| --- | --- |
| less than all products | cT (6I + 6H + 2Q + 2K) and the larger of 3cTI (results of P) and W: gate, up and the gradient of their product are each there twice, as the base's product and as LoRA's, which P adds |
| all products | cT (4I + 3H + 2Q + 2K) and the larger of 3cTI and W: only the gradient is there twice |
| everything, or all recomputed by checkpointing | cT (5I + 5H + 2Q + 2K) + W, in the product before P |

A linear layer of the MLP without LoRA has nothing twice, and the product of gate and up is then not made again for MLP
out. LoRA over 16-bit weights, where PEFT scales and adds, has two more I in every row, and one more H in the first.
Norms of queries and keys add 2(Q + K) to the first row and Q + K to the others; padding widens as above.

The forward of the last layer takes 4cTI + 3cTH + W, or what is kept, 3cTH and W, on top of its input.

Source: the joint graph that torch's partitioner cuts and the allocations in inductor's code for it, with its rules for
GPUs, for Llama shapes of 1B to 70B at 2,048 tokens (torch 2.11 and 2.13 alike): benchmarks/compiled_memory.py prints both
beside the tables, tests/test_planner_compiled.py compares with the first and with what was measured. Left out: other
architectures, dropout, and FSDP, which refuses compiled layers.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import replace
from itertools import product

from hf_fsdp_qlora.activations import (
    EMBEDDING_MOMENT,
    FIRST_LAYER_MOMENT,
    FORWARD_MOMENT,
    LAYER_MOMENT,
    Activations,
    StepSettings,
    activations,
    dequantized_bytes,
    is_gated,
)
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.memory_joined import joined_backward_bytes, joined_layer_bytes, joins
from hf_fsdp_qlora.model_shape import ATTENTION_IN, MLP_IN, MLP_OUT, ModelShape

CERTAIN = 1.02
"""How much more room than all products take makes it certain that all are kept: adapters, too, count a little."""


def knows_compiled(shape: ModelShape) -> bool:
    """Whether a model's decoder layers are like Llama's, so that the tables above hold."""
    fused = any(linear.out_features == 2 * shape.intermediate_size for linear in shape.linears)
    plain = shape.wide_norms == 2 and not shape.norm_ends_layer and not shape.eager_attention
    return plain and is_gated(shape) and not fused


def compiled_activations(shape: ModelShape, step: StepSettings, budget: float | None) -> dict[str, Activations]:
    """As `activations`, for compiled decoder layers.

    Args:
        budget: the `activation_budget`; None leaves it to `step.checkpointing` what is recomputed.

    Raises:
        ConfigError: the layers are of a kind that is not known compiled.
    """
    if not knows_compiled(shape):
        raise ConfigError(
            f"compile_layers is unknown to the planner for {shape.model_type}, whose decoder layers are not like "
            "Llama's. Leave compile_layers and activation_budget out of the estimate; the run itself may have them."
        )
    recomputed = budget is None and step.checkpointing
    share = 1.0 if budget is None else budget
    layer = compiled_layer_bytes(shape, step, share)
    stored = 0 if recomputed else layer
    backward = compiled_backward_bytes(shape, step, share) - step.compute_bytes * step.tokens * shape.hidden_size
    forward = _forward_bytes(shape, step, stored)
    moments = {}
    # With checkpointing every layer keeps its input, as compiled layers do.
    for name, moment in activations(shape, replace(step, checkpointing=True, offloaded=False)).items():
        others = 0 if name in (EMBEDDING_MOMENT, FIRST_LAYER_MOMENT) else (shape.num_layers - 1) * stored
        moment = replace(moment, kept_bytes=moment.kept_bytes + others)
        if name == FORWARD_MOMENT:
            moment = replace(moment, layer_bytes=stored, passing_bytes=forward - stored)
        elif name in (LAYER_MOMENT, FIRST_LAYER_MOMENT):
            moment = replace(moment, layer_bytes=layer, passing_bytes=backward - layer)
        elif name != EMBEDDING_MOMENT:
            moment = replace(moment, layer_bytes=stored)
        moments[name] = moment
    return moments


def compiled_layer_bytes(shape: ModelShape, step: StepSettings, budget: float) -> int:
    """What one layer keeps for its backward, its own input aside. The first table above."""
    if budget == 0:
        return 0
    small = step.tokens * (
        step.compute_bytes * step.lora_r * len(step.lora) + 4 * (shape.num_heads + shape.wide_norms)
    )
    everything = step.compute_bytes * step.tokens * _all_widths(shape, step)
    if budget == 1:
        small += _adapter_bytes(shape, step)
    if joins(shape, step):
        return joined_layer_bytes(shape, step, budget, everything, small)
    if budget == 1:
        return everything + small
    scale = step.compute_bytes * step.tokens
    room, products = budget * everything, scale * sum(_products(shape))
    attention = scale * (shape.query_width + shape.qk_norm_width)
    if room >= products + attention:
        return products + attention + small
    sums = (scale * sum(kept) for kept in product(*((0, width) for width in _products(shape))))
    return max(size for size in sums if size <= room) + small


def compiled_backward_bytes(shape: ModelShape, step: StepSettings, budget: float) -> int:
    """The peak of one layer's backward with its input, its gradient and all that it kept. The second table above."""
    scale, hidden, queries, keys = (
        step.compute_bytes * step.tokens,
        shape.hidden_size,
        shape.query_width,
        shape.key_width,
    )
    wide, dense = scale * shape.intermediate_size, _dense_bytes(shape, step)
    names = [linear.leaf for linear in shape.linears if linear.name in step.lora]
    ins, out = sum(name in MLP_IN for name in names), int(any(name in MLP_OUT for name in names))
    apart = 2 if ins + out and not step.fused_lora else 0
    keys_values = 2 * (queries if step.padded else keys)
    mask = step.compute_bytes * step.tokens * step.seq_len if step.padded else 0
    small = mask + _adapter_bytes(shape, step) + scale * step.lora_r * len(step.lora)
    if joins(shape, step):
        everything, kept = scale * _all_widths(shape, step), compiled_layer_bytes(shape, step, budget)
        return joined_backward_bytes(shape, step, budget, everything, kept, 0 if budget == 1 else small)
    if budget == 1:
        narrow = 5 * hidden + 2 * queries + keys_values + shape.qk_norm_width
        return (3 + 2 * out + apart) * wide + dense + scale * narrow + small
    results = max((2 + out) * wide, dense)
    products = scale * sum(_products(shape))
    if budget * scale * _all_widths(shape, step) >= CERTAIN * products:
        narrow = 3 * hidden + 2 * queries + 2 * keys + shape.qk_norm_width
        return (3 + out + apart) * wide + results + scale * narrow + small
    narrow = (6 + apart // 2) * hidden + 2 * queries + keys_values + 2 * shape.qk_norm_width
    return (3 + ins + out + apart) * wide + results + scale * narrow + small


def _forward_bytes(shape: ModelShape, step: StepSettings, stored: int) -> int:
    scale = step.compute_bytes * step.tokens
    flow, dense = 3 * scale * shape.hidden_size, _dense_bytes(shape, step)
    return flow + dense + max(4 * scale * shape.intermediate_size, stored)


def _all_widths(shape: ModelShape, step: StepSettings) -> int:
    """Elements per token of everything that is expensive to compute or read again by backward."""
    names = {linear.leaf for linear in shape.linears if linear.name in step.lora}
    read = [bool(names & set(place)) for place in (ATTENTION_IN, MLP_IN, MLP_OUT)]
    attention = (
        2 * shape.query_width + 2 * (shape.query_width if step.padded else shape.key_width) + shape.qk_norm_width
    )
    mask = step.seq_len if step.padded else 0
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return (1 + read[0] + read[1]) * hidden + attention + mask + (2 + read[2]) * inner


def _products(shape: ModelShape) -> tuple[int, ...]:
    """Widths of the outputs of the products that backward may want again; of the last product it never does."""
    queries, keys, inner = shape.query_width, shape.key_width, shape.intermediate_size
    return queries, keys, keys, shape.hidden_size, inner, inner


def _dense_bytes(shape: ModelShape, step: StepSettings) -> int:
    return max(dequantized_bytes(linear, step) for linear in shape.linears if linear.leaf in (*MLP_IN, *MLP_OUT))


def _adapter_bytes(shape: ModelShape, step: StepSettings) -> int:
    """One layer's adapter in the compute dtype."""
    linears = [linear for linear in shape.linears if linear.name in step.lora]
    return step.compute_bytes * step.lora_r * sum(linear.in_features + linear.out_features for linear in linears)
