"""What compiled decoder layers keep and need where layers that read one input compute together (siblings.py): 4 bits
of bitsandbytes with LoRA. Arithmetic; memory_compiled.py has the letters and the layers it holds for.

What the compiler counts is as in memory_compiled.py, and so is its room: the budget times everything. Query and key
are kept after their rotation, the value as it was made (copied, if one product made all three: siblings.py).

| budget | kept |
| --- | --- |
| 0 | nothing |
| 1, or no budget | memory_compiled.py's row |
| between | of these outputs those that save most multiplications and fit into the room: query, key and value (one, if one product makes them, else three), attention's output, H, gate and up (likewise); if there is room for all these, what joined products read (H, and r for each of their layers) and the norms of queries and keys |

Attention's output is a candidate for flash attention and not for cuDNN's, and a few outputs may nearly fit: of what
would be chosen with and without, and with 2 % more room, the largest is taken.

The layer's backward peaks at one of three moments; its input, the gradient that comes in and all that it kept are there:

| moment | beside these |
| --- | --- |
| product with MLP out | 2cTI (its input's gradient: the base's part and LoRA's), and its weight |
| what is fused into P | the same 2cTI, gate and up where they are made again, and the larger of 3cTI (results) and the weight that makes them |
| products with gate and up | 2cTI (their gradients), cTH, and both weights; what was kept of gate and up is gone |

With everything kept the product of gate and up is gone by P, which then has 1cTI: it makes only gradients, one of them
in place. If one product makes gate and up, P has 2cTI more, both gradients again side by side, and makes nothing in
place (torch 2.11 makes them so at once, and needs less); and there is one weight in the last row. Beside the second
and third is what was made again on the way to gate or up: cT 2H (the MLP's input, LoRA's part of o), H more if o is
not kept, Q more if attention's output is not either, and then, if need be, H and query, key and value (with padding as
wide as Q each) with the inputs of their norms.

Source: as in memory_compiled.py; tests/test_planner_joined.py compares. Left out: adapters whose scalings differ, or
whose ranks differ from `lora_r`, and their A in c, kept with what joined products read.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from hf_fsdp_qlora.activations import StepSettings, dequantized_bytes
from hf_fsdp_qlora.formats import ONE_PRODUCT_BYTES
from hf_fsdp_qlora.model_shape import ATTENTION_IN, MLP_IN, MLP_OUT, LinearShape, ModelShape

ATTENTION, OUT = "attention", "o"
NEARLY = 1.02
"""How much more room than the planner knows of the compiler may have: adapters count a little, too."""


@dataclass(frozen=True)
class Output:
    """What the compiler may keep.

    Attributes:
        makes: names of the layers whose outputs it is.
        width: values per token.
        saves: multiplications per token.
    """

    makes: tuple[str, ...]
    width: int
    saves: int


def joins(shape: ModelShape, step: StepSettings) -> bool:
    """Whether any layers compute together."""
    return any(len(_joined(shape, step, place)) > 1 for place in (ATTENTION_IN, MLP_IN))


def joined_layer_bytes(shape: ModelShape, step: StepSettings, budget: float, everything: int, small: int) -> int:
    """What one layer keeps for its backward, its own input aside. The first table above.

    Args:
        everything: the compiler's count of all that is expensive.
        small: what is kept at every budget but 0.
    """
    if budget == 0:
        return 0
    if budget == 1:
        return everything + small
    kept = _kept(shape, step, budget * everything)
    return step.compute_bytes * step.tokens * _width(kept) + small


def joined_backward_bytes(
    shape: ModelShape, step: StepSettings, budget: float, everything: int, kept: int, small: int
) -> int:
    """The peak of one layer's backward with its input, its gradient and all that it kept. The second table above.

    Args:
        everything: as above.
        kept: `joined_layer_bytes`.
        small: the adapter, its (T, r) products, and the mask.
    """
    scale = step.compute_bytes * step.tokens
    hidden, inner = scale * shape.hidden_size, scale * shape.intermediate_size
    of_mlp = _joined(shape, step, MLP_IN)
    is_one = _is_one_product(of_mlp, step)
    out = next(linear for linear in shape.linears if linear.leaf in MLP_OUT)
    has_lora = int(out.name in step.lora)
    weights = [linear for linear in shape.linears if linear.leaf in MLP_IN]
    # Outside a joined product, LoRA's part is a tensor of its own.
    apart = inner * sum(linear.name in step.lora for linear in weights) if not of_mlp else 0
    dense = max(_wide_bytes([linear], step, 2) for linear in weights)
    both = _wide_bytes(weights, step, 2) if of_mlp else dense
    gradient = (1 + has_lora) * inner
    down = gradient + dequantized_bytes(out, step)
    if budget == 1:
        product_bytes = has_lora * inner
        fused = gradient + (4 if is_one else 1) * inner - product_bytes + apart  # one result in gate's or up's place
        up = (4 if is_one else 2) * inner - 2 * inner - product_bytes + hidden + both
        return 2 * hidden + kept + small + max(down, fused, up)
    made = {name for output in _kept(shape, step, budget * everything) for name in output.makes} if budget else set()
    missing = sum(linear.name not in made for linear in weights)
    again = scale * _made_again(shape, step, made) if missing else 0
    results = (2 + has_lora + (2 if is_one else 0)) * inner
    weight = both if is_one else dense
    fused = gradient + missing * inner + apart + max(results, weight if missing else 0) + again
    up = (4 if is_one else 2) * inner - (2 - missing) * inner + hidden + both + again
    return 2 * hidden + kept + small + max(down, fused, up)


def _kept(shape: ModelShape, step: StepSettings, room: float) -> list[Output]:
    """What the compiler chooses, where that is uncertain what holds most: see the module."""
    outputs = _outputs(shape, step)
    products = [output for output in outputs if ATTENTION not in output.makes]
    choices = [_knapsack(step, some, more * room) for some in (outputs, products) for more in (1.0, NEARLY)]
    kept = max(choices, key=_width)
    with_read = [*kept, _read(shape, step)]
    is_room = len(kept) == len(outputs) and step.compute_bytes * step.tokens * _width(with_read) <= NEARLY * room
    return with_read if is_room else kept


def _knapsack(step: StepSettings, outputs: list[Output], room: float) -> list[Output]:
    """What saves most time of all that fits."""
    scale = step.compute_bytes * step.tokens
    fitting: list[list[Output]] = []
    for chosen in product((False, True), repeat=len(outputs)):
        kept = [output for output, is_kept in zip(outputs, chosen, strict=True) if is_kept]
        if scale * _width(kept) <= room:
            fitting.append(kept)
    return max(fitting, key=lambda kept: (sum(output.saves for output in kept), _width(kept)))


def _width(outputs: list[Output]) -> int:
    return sum(output.width for output in outputs)


def _read(shape: ModelShape, step: StepSettings) -> Output:
    """What joined products read, and norms of queries and keys."""
    joined = [_joined(shape, step, place) for place in (ATTENTION_IN, MLP_IN)]
    inputs = sum(shape.hidden_size + step.lora_r * len(linears) for linears in joined if linears)
    return Output((), inputs + shape.qk_norm_width, 0)


def _outputs(shape: ModelShape, step: StepSettings) -> list[Output]:
    queries = shape.query_width
    outputs = [Output((ATTENTION,), queries, 2 * step.seq_len * queries)]
    outputs.append(Output((OUT,), shape.hidden_size, shape.hidden_size * queries))
    for place in (ATTENTION_IN, MLP_IN):
        joined = _joined(shape, step, place)
        if _is_one_product(joined, step):
            width = sum(linear.out_features for linear in joined)
            names, saves = tuple(linear.name for linear in joined), sum(linear.numel for linear in joined)
            outputs.append(Output(names, width, saves))
        else:
            joined = ()
        others = [linear for linear in shape.linears if linear.leaf in place and linear not in joined]
        outputs += [Output((one.name,), one.out_features, one.numel) for one in others]
    return outputs


def _made_again(shape: ModelShape, step: StepSettings, made: set[str]) -> int:
    """Per token, what is made on the way to gate or up and stays for the rest of the backward."""
    hidden, queries = shape.hidden_size, shape.query_width
    if OUT in made:
        return 2 * hidden
    if ATTENTION in made:
        return 3 * hidden
    again = 3 * hidden + queries
    names = {linear.name for linear in shape.linears if linear.leaf in ATTENTION_IN}
    if names <= made:
        return again + shape.qk_norm_width
    widths = sum(output.width for output in _outputs(shape, step) if names & set(output.makes))
    return again + hidden + widths + (_widened(shape) if step.padded else 0) + shape.qk_norm_width


def _widened(shape: ModelShape) -> int:
    """Per token, what keys and values grow by where padding makes attention want them as wide as queries."""
    return 2 * (shape.query_width - shape.key_width)


def _joined(shape: ModelShape, step: StepSettings, place: tuple[str, ...]) -> tuple[LinearShape, ...]:
    """The layers of a place that compute together, in the order they are called."""
    linears = tuple(linear for linear in shape.linears if linear.leaf in place and linear.name in step.lora)
    if not step.joins or len(linears) < 2:
        return ()
    alike = len({(linear.in_features, linear.has_bias) for linear in linears}) == 1
    # What wide_kernel.py can write.
    aligned = linears[0].in_features % step.block_size == 0 and len(linears) * step.lora_r % 8 == 0
    return linears if alike and aligned else ()


def _is_one_product(joined: tuple[LinearShape, ...], step: StepSettings) -> bool:
    return len(joined) > 1 and step.compute_bytes * sum(linear.numel for linear in joined) <= ONE_PRODUCT_BYTES


def _wide_bytes(linears: list[LinearShape], step: StepSettings, count: int) -> int:
    """Dequantised weights with the columns for B of `count` layers."""
    columns = count * step.lora_r
    return step.compute_bytes * sum(linear.out_features * (linear.in_features + columns) for linear in linears)
