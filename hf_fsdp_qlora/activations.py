"""What a training step keeps in GPU memory beside parameters, gradients and optimizer state. Arithmetic only.

Notation: T tokens of a micro-batch on one GPU (batch x sequence), H hidden size, I intermediate size, Q and K the
widths of all query and of all key heads, S sequence length, c bytes of the compute dtype (2 for bf16).

**Kept per decoder layer until its backward** (all of it for every layer without gradient checkpointing, for one layer
at a time with it), because some backward reads it:

| bytes | kept by |
| --- | --- |
| 4TH per RMS norm over H | the norm's float32 copy of its input (transformers computes norms in float32) |
| cTH per RMS norm that is trained | its output before the weight |
| 4T(Q + K) with query and key norms | the same |
| cTH, cTQ, cTH, cTI | inputs of the LoRA A of attention in and out, MLP in and out: one per place that is targeted |
| cTr per LoRA layer | output of A, input of B |
| c r (in + out) per LoRA layer | the adapter in the compute dtype, cast by autocast or gathered by FSDP2 |
| (c + 1)T in_features per LoRA layer with dropout | the dropped-out input and the mask, which are not shared |
| cTQ, 2cTK, cTQ, 4T heads | attention: query, key and value, output, log-sum-exp (flash or efficient kernels) |
| (4 + c) T S heads, c T S heads | eager attention: float32 and cast probabilities; soft-capped scores |
| 2cT(Q - K), cTS | with a mask (padded batches): key and value repeated for every query head, and the additive mask |
| 3cTI gated, cTI plain | MLP: gate, activation and up projection; or the activation's input |

A quantised weight is read again in backward from its packed rows and a frozen one from its parameter: no copies.

**Kept once**: cTH per decoder layer with checkpointing (its input), cTH and 4TH (output and float32 input of the final
norm), 2cT head_dim (rotary tables), TS bytes of boolean mask with padding.

With TRL's `activation_offloading` the inputs of decoder layers go to pinned host memory: six of them are on the device
at a time, the one in work and five that are being copied (read in trl 1.16, not measured).

**Passing**, in the order of a step; what an engine gathers at each of these moments is in memory_gathered.py, and the
highest sum is the step's peak.

- The input embedding being fetched: nothing.
- The forward of the last decoder layer: 2cTH (residual and the MLP's input) and the larger of 3cTI (activation, up
  projection and their product; where PEFT adds the adapter 4cTI: activation, the two outputs of a LoRA layer and their
  sum) and 2cTI with the dequantised weight. Without checkpointing the layer's kept tensors are there already; on top
  come the weight, 3cTH (input, residual, output), and cTH and cTI if the inputs of MLP in and MLP out are not kept. To
  the end of the forward the decoder holds its embedded tokens (cTH), which with checkpointing are the first input.
- The head being fetched: the last layer's output (cTH) and the embedded tokens.
- The head's forward and backward, see 2. The final norm, see 3. The last decoder layer, see 1.
- The first decoder layer, as 1., when all other layers' tensors are gone and all gradients are there.

1. The layer that is recomputed or run backward first (the last of the model), on top of its kept tensors, whichever
   is most of:
   - its recomputation up to MLP out: 3cTH (residual, output, the gradient that waits), cTH and cTI if the inputs of
     MLP in and MLP out are not kept, and the dequantised weight with its float32 statistics;
   - the backward of MLP out: cTH, the same weight, its input's gradient cTI (two where PEFT's layers add the adapter,
     with dropout and under FSDP1; else the base's product does, row_ops.py);
   - the backward of the product of gate and up: cTH and 3cTI, 4cTI where PEFT adds adapters and the two are one layer;
   - the backward of a norm after the MLP: five float32 tensors of TH;
   - the backward of an eager softmax: two float32 tensors of T S heads, the cast probabilities and what the MLP kept
     being gone.
   A kept input of MLP out (cTI) is gone after the first.
2. The head, in the tiles of TRL's fused kernel, V being the vocabulary: hidden states picked by the mask (cTH), a tile
   of min(T, 4096) x 32,768 logits in the compute dtype, ten numbers per token; in backward also float32 gradients of
   the hidden states (4TH), their copy (cTH) and the scatter of them (cTH). A trained head has a float32 gradient in
   backward (4VH), and is cast chunk by chunk where it is a float32 master (32,768 cH) or else has its gradient cast
   (cVH, FSDP2). From then on its gradient is there.
3. Backward of the final norm: its float32 input and five more float32 tensors of TH, while every layer's tensors
   are kept.

Rotary training: frozen layers keep no inputs of linear layers, active ones do and need no dequantised weight. Layers
below the lowest active block keep nothing, and that layer not the float32 input of its first norm. If the head is all
that is active beside the norm, no layer keeps anything, and the final norm cTH in place of its float32 input. At the
end of the backward all gradients are there: with 4cTH (gradients around the first product), or with those of the
embedded tokens and the sums that CUDA's kernel makes of them in float32, a row per distinct token and per ten tokens.

Source of the tables: operators recorded with fake tensors (tests/test_memory.py replays them), transformers 5.23,
trl 1.16. Compiled layers: memory_compiled.py. Left out: Liger kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_fsdp_qlora.model_shape import ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT, LinearShape, ModelShape

EMBEDDING_MOMENT = "fetching the embedding"
FORWARD_MOMENT = "forward of a decoder layer"
HEAD_FETCH_MOMENT = "fetching the head"
HEAD_FORWARD_MOMENT = "forward of the head"
HEAD_MOMENT = "backward of the head"
NORM_MOMENT = "backward of the final norm"
LAYER_MOMENT = "backward of the last decoder layer"
FIRST_LAYER_MOMENT = "backward of the first decoder layer"
END_MOMENT = "end of the backward"
OFFLOAD_STASH = 5
"""Tensors that TRL's `activation_offloading` keeps on the device while they are copied (its `max_fwd_stash_size`)."""
EMBEDDING_ROWS_PER_SUM = 10
"""Gradients that CUDA's backward of an embedding adds up at once (NROWS_PER_THREAD in its source)."""
HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768
"""Tile of TRL's fused head (TOKEN_CHUNK_SIZE and _CHUNKED_LOGPROB_CHUNK_SIZE)."""


@dataclass(frozen=True)
class StepSettings:
    """What of a run the activations depend on. `lora` says where LoRA layers are, by `LinearShape.name`.

    In rotary training backward goes through `backward_layers`, of which `trained_layers` are active, and
    `trains_base` speaks of the layer at hand; None is all of them.
    """

    batch_size: int
    seq_len: int
    compute_bytes: int
    lora: frozenset[str]
    lora_r: int
    dropout: bool
    fused_lora: bool
    checkpointing: bool
    padded: bool
    quantized: bool
    block_size: int
    trains_head: bool
    head_is_cast: bool
    trains_base: bool
    offloaded: bool = False
    trains_embedding: bool = False
    joins: bool = False
    backward_layers: int | None = None
    trained_layers: int | None = None

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Activations:
    """Bytes at one moment of a step, by kind."""

    moment: str
    kept_bytes: int
    layer_bytes: int
    passing_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.kept_bytes + self.layer_bytes + self.passing_bytes + self.logits_bytes


def activations(shape: ModelShape, step: StepSettings) -> dict[str, Activations]:
    """The moments of a step, by name. See the module's docstring for the terms."""
    tokens, c, hidden = step.tokens, step.compute_bytes, shape.hidden_size
    flow, depth = c * tokens * hidden, _depth(shape, step)
    layer, passing = (layer_bytes(shape, step), _passing_bytes(shape, step)) if depth else (0, 0)
    always = 2 * c * tokens * shape.head_dim + (tokens * step.seq_len if step.padded else 0)
    unneeded = _first_norm_bytes(shape, step)
    last = layer - (unneeded if depth == 1 else 0)
    stored = 0 if step.checkpointing else last
    kept = always + _kept_by_others(shape, step) - (0 if step.checkpointing or depth < 2 else unneeded)
    embedded = 0 if step.checkpointing and depth == shape.num_layers else flow
    final_norm = ((4 if depth else c) + c) * tokens * hidden
    moments = [
        Activations(EMBEDDING_MOMENT, 0, 0, 0, 0),
        Activations(FORWARD_MOMENT, kept, stored, embedded + _forward_bytes(shape, step), 0),
        Activations(HEAD_FETCH_MOMENT, kept, stored, embedded + flow, 0),
        Activations(HEAD_FORWARD_MOMENT, kept, stored, final_norm, _head_forward_bytes(shape, step)),
        Activations(HEAD_MOMENT, kept, stored, final_norm, _head_bytes(shape, step)),
        Activations(NORM_MOMENT, kept, stored, (24 if depth else 3 * c) * tokens * hidden, 0),
    ]
    if depth:
        first = flow if step.checkpointing else 0
        moments += [
            Activations(LAYER_MOMENT, kept, last, passing, 0),
            Activations(FIRST_LAYER_MOMENT, always + first, layer - unneeded, passing, 0),
        ]
    if step.backward_layers is not None:
        sums = 4 * hidden * (min(tokens, shape.vocab_size) + tokens // EMBEDDING_ROWS_PER_SUM)
        moments.append(Activations(END_MOMENT, always, 0, 2 * flow + (sums if step.trains_embedding else 2 * flow), 0))
    return {moment.moment: moment for moment in moments}


def _depth(shape: ModelShape, step: StepSettings) -> int:
    return shape.num_layers if step.backward_layers is None else step.backward_layers


def _first_norm_bytes(shape: ModelShape, step: StepSettings) -> int:
    """The float32 input of the lowest active layer's first norm, which is not kept if it needs no gradient."""
    if step.backward_layers is None or step.trains_embedding or shape.norm_ends_layer:
        return 0
    return 4 * step.tokens * shape.hidden_size


def _kept_by_others(shape: ModelShape, step: StepSettings) -> int:
    """What the decoder layers keep that are not the one at hand; with checkpointing the inputs of all."""
    depth = _depth(shape, step)
    if step.checkpointing:
        layers = min(depth, OFFLOAD_STASH + 1) if step.offloaded else depth
        return layers * step.compute_bytes * step.tokens * shape.hidden_size
    if not depth:
        return 0
    if step.trained_layers is None:
        return (depth - 1) * layer_bytes(shape, step)
    trained = step.trained_layers - int(step.trains_base)
    kept = trained * layer_bytes(shape, replace(step, trains_base=True))
    return kept + (depth - 1 - trained) * layer_bytes(shape, replace(step, trains_base=False))


def layer_bytes(shape: ModelShape, step: StepSettings) -> int:
    """What one decoder layer keeps for its backward, its own input aside."""
    c, hidden, inner = step.compute_bytes, shape.hidden_size, shape.intermediate_size
    queries, keys = shape.query_width, shape.key_width
    per_token = (4 + (c if step.trains_base else 0)) * (hidden * shape.wide_norms + shape.qk_norm_width)
    widths = {ATTENTION_IN: hidden, ATTENTION_OUT: queries, MLP_IN: hidden, MLP_OUT: inner}
    for place, width in widths.items():
        if any(_is_trained(linear, step) for linear in shape.linears if linear.leaf in place):
            # Attention keeps its own output anyway, and dropout's outputs are kept in place of its inputs.
            per_token += 0 if place == ATTENTION_OUT or step.dropout else c * width
    for linear in shape.linears:
        if linear.name in step.lora:
            per_token += c * step.lora_r + ((c + 1) * linear.in_features if step.dropout else 0)
    adapters = sum(x.out_features + x.in_features for x in shape.linears if x.name in step.lora) * step.lora_r * c
    per_token += 2 * c * queries + 2 * c * keys + 4 * shape.num_heads
    if shape.eager_attention:
        per_token += shape.num_heads * step.seq_len * (4 + (2 if shape.softcaps_attention else 1) * c)
    if step.padded:
        per_token += 2 * c * (queries - keys) + c * step.seq_len
    per_token += (3 if is_gated(shape) else 1) * c * inner
    return step.tokens * per_token + adapters


def dequantized_bytes(linear: LinearShape, step: StepSettings) -> int:
    """The 16-bit weight that a product needs for a moment, and the float32 statistics it is made from."""
    if not step.quantized:
        return 0
    return linear.numel * step.compute_bytes + linear.numel // step.block_size * 4


def is_gated(shape: ModelShape) -> bool:
    """Whether the MLP has a gate: its input layers then put out two vectors of the intermediate size."""
    outputs = sum(linear.out_features for linear in shape.linears if linear.leaf in MLP_IN)
    return outputs == 2 * shape.intermediate_size


def _passing_bytes(shape: ModelShape, step: StepSettings) -> int:
    """The most that comes on top of one layer's kept tensors, while it is recomputed or run backward."""
    tokens, c = step.tokens, step.compute_bytes
    flow, wide = c * tokens * shape.hidden_size, c * tokens * shape.intermediate_size
    down = next(linear for linear in shape.linears if linear.leaf in MLP_OUT)
    dense = dequantized_bytes(down, step)
    keeps_mlp_in, keeps_mlp_out = _keeps_inputs(shape, step)
    kept_input = wide if keeps_mlp_out else 0
    is_fused = any(linear.out_features == 2 * shape.intermediate_size for linear in shape.linears)
    recompute = (3 if keeps_mlp_in else 4) * flow + dense + wide - kept_input
    branches = 2 if down.name in step.lora and not step.fused_lora else 1
    down_backward = flow + dense + branches * wide - kept_input
    product_backward = flow + (4 if is_fused and not step.fused_lora else 3) * wide - kept_input
    norm_backward = 20 * tokens * shape.hidden_size if shape.norm_ends_layer else 0
    scores = tokens * step.seq_len * shape.num_heads
    mlp_kept = (4 if is_gated(shape) else 2) * wide + 4 * tokens * shape.hidden_size
    softmax_backward = (8 - c) * scores - mlp_kept if shape.eager_attention else 0
    moments = (down_backward, product_backward, norm_backward, softmax_backward)
    return max(recompute if step.checkpointing else 0, *moments)


def _forward_bytes(shape: ModelShape, step: StepSettings) -> int:
    tokens, c = step.tokens, step.compute_bytes
    dense = max(dequantized_bytes(linear, step) for linear in shape.linears)
    flow, wide = c * tokens * shape.hidden_size, c * tokens * shape.intermediate_size
    if not step.checkpointing and _depth(shape, step):
        keeps_in, keeps_out = _keeps_inputs(shape, step)
        return (3 if keeps_in else 4) * flow + dense + (0 if keeps_out else wide)
    apart = not step.fused_lora and any(x.name in step.lora for x in shape.linears if x.leaf in MLP_IN)
    return 2 * flow + max((4 if apart else 3) * wide, 2 * wide + dense)


def _head_forward_bytes(shape: ModelShape, step: StepSettings) -> int:
    tokens, c = step.tokens, step.compute_bytes
    tile = c * min(tokens, HEAD_TOKENS) * min(HEAD_VOCABULARY, shape.vocab_size)
    cast = c * min(HEAD_VOCABULARY, shape.vocab_size) * shape.hidden_size if step.head_is_cast else 0
    return tile + c * tokens * shape.hidden_size + 40 * tokens + cast


def _head_bytes(shape: ModelShape, step: StepSettings) -> int:
    c = step.compute_bytes
    flow = (2 * c + 4) * step.tokens * shape.hidden_size
    gradient = 4 * shape.vocab_size * shape.hidden_size if step.trains_head else 0
    copy = c * shape.vocab_size * shape.hidden_size if step.trains_head and not step.head_is_cast else 0
    return _head_forward_bytes(shape, step) + flow + gradient + copy


def _keeps_inputs(shape: ModelShape, step: StepSettings) -> tuple[bool, bool]:
    """Whether a layer keeps the inputs of MLP in and of MLP out."""
    trained = {linear.leaf for linear in shape.linears if _is_trained(linear, step)}
    return tuple(bool(trained & set(place)) and not step.dropout for place in (MLP_IN, MLP_OUT))  # type: ignore


def _is_trained(linear: LinearShape, step: StepSettings) -> bool:
    return step.trains_base or linear.name in step.lora
