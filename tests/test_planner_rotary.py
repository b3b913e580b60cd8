"""The planner's visits against those of real plans, and what it says of a visit against a replay of its step."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from hf_fsdp_qlora import RotaryConfig, load_model, prepare_rotary
from hf_fsdp_qlora.activations import (
    END_MOMENT,
    FIRST_LAYER_MOMENT,
    FORWARD_MOMENT,
    HEAD_FETCH_MOMENT,
    LAYER_MOMENT,
    NORM_MOMENT,
)
from hf_fsdp_qlora.memory_settings import MemorySettings, trainable_parameters
from hf_fsdp_qlora.memory_step import CUBLAS_BYTES, moments_of_step
from hf_fsdp_qlora.memory_visits import Visit, rotary_visits
from hf_fsdp_qlora.model_shape import ModelShape, model_shape
from hf_fsdp_qlora.rotary.config import ActiveLimit
from hf_fsdp_qlora.rotary.plan import make_plan, plan_blocks
from hf_fsdp_qlora.rotary.schedule import Schedule
from tests.living_bytes import LivingBytes

SIZES: dict[str, Any] = dict(
    hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=4096, max_position_embeddings=1024,
)  # fmt: skip
TOKENS = 768
FEW_TOKENS = 32
SWEEPS = 200


def meta_blocks(tied: bool) -> tuple[Any, ModelShape]:
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return plan_blocks(model, shapes, "layer"), model_shape(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fraction", [None, 0.05, 0.12, 0.2, 0.3, 0.45, 0.7, 1.0])
def test_no_visit_of_a_plan_exceeds_the_planners(fraction: float | None, tied: bool) -> None:
    blocks, shape = meta_blocks(tied)
    limit = ActiveLimit(blocks=1) if fraction is None else ActiveLimit(fraction=fraction)
    plan = make_plan(blocks, limit=limit, always_active=("norm",), bytes_per_active=16)
    schedule = Schedule(plan, order="random", seed=0, coverage_floor=0.5)
    planned = {(visit.embedding, visit.head): visit for visit in rotary_visits(shape, fraction)}
    assert trainable_parameters(shape, MemorySettings(method="rotary", active_fraction=fraction)) == max(
        visit.numel for visit in planned.values()
    )
    seen = dict.fromkeys(planned, 0)
    for number in range(SWEEPS * len(blocks)):
        kinds = [blocks[index].kind for index in schedule.blocks_of_visit(number)]
        embedding = "embedding" in kinds
        key = (embedding, "head" in kinds or (tied and embedding))
        assert kinds.count("layer") <= planned[key].layers
        seen[key] = max(seen[key], plan.numel_of(schedule.blocks_of_visit(number)))
    if fraction == 1.0:  # one visit has everything; without the embedding there never is one
        assert seen[True, True] == planned[True, True].numel == plan.numel
    else:
        assert seen == {key: visit.numel for key, visit in planned.items()}


def step_peaks(path: Path, active: tuple[str, ...], checkpointing: bool, tokens: int) -> tuple[int, int, int]:
    """With these blocks active: bytes before a step, the most of its forward, and of its backward from the norm."""
    config = RotaryConfig(active="30%")
    model: Any = load_model(path, rotary=config, dtype=torch.bfloat16)
    add_fused_lm_head(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # as RotaryCallback does
    model.train()
    rotary = prepare_rotary(model, config)
    rotary.active.set_trainable(False)
    wanted = [index for index, block in enumerate(rotary.plan.blocks) if block.name in (*active, "norm")]
    assert len(wanted) == len(active) + 1
    rotary.active.activate(rotary.names(wanted))
    living = LivingBytes()
    for tensor in (*model.parameters(), *(piece.values for piece in rotary.active.slices.values())):
        living.see(tensor)
    before = living.now()
    found: list[int] = []

    def end(*_: Any) -> None:
        found.append(living.peak)
        living.peak = living.now()

    model.model.norm.register_forward_pre_hook(end)
    model.model.norm.register_forward_hook(lambda _, __, output: output.register_hook(end) and None)
    ids = torch.randint(0, SIZES["vocab_size"], (1, tokens))
    with living:
        model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    end()
    forward, _, backward = found
    return before, forward, backward


TIED: tuple[tuple[str, ...], Visit] = (("embedding",), Visit(True, True, 0, 6, False, False, 0, 0))
VISITS: dict[str, tuple[tuple[str, ...], Visit]] = {
    "first_and_last": (("layer 0", "layer 5"), Visit(False, False, 2, 6, True, True, 0, 0)),
    "middle": (("layer 2", "layer 3"), Visit(False, False, 2, 4, False, True, 0, 0)),
    "last": (("layer 5",), Visit(False, False, 1, 1, True, True, 0, 0)),
    "embedding": (("embedding",), Visit(True, False, 0, 6, False, False, 0, 0)),
    "head_and_last": (("layer 5", "head"), Visit(False, True, 1, 1, True, True, 0, 0)),
}


def with_sizes(visit: Visit, shape: ModelShape) -> Visit:
    outside = shape.outside_other_numel + visit.embedding * shape.embedding_numel + visit.head * shape.head_numel
    places = visit.embedding, visit.head, visit.layers, visit.backward_layers, visit.trains_last, visit.trains_first
    return Visit(*places, outside_numel=outside, numel=outside + visit.layers * shape.layer_numel)


@pytest.mark.parametrize(
    ("name", "checkpointing", "tied", "tokens"),
    [*product(VISITS, [True, False], [False], [TOKENS]), ("embedding", True, False, FEW_TOKENS),
     ("tied_embedding", True, True, FEW_TOKENS)],
)  # fmt: skip
def test_a_step_of_a_visit_takes_what_the_planner_says(
    name: str, checkpointing: bool, tied: bool, tokens: int, tmp_path: Path
) -> None:
    """Within 5 %, the planner's own goal, of all that comes on top; the head's backward is another one on a CPU. With
    few tokens the most is the embedding's gradient, where CUDA's own sums of it are small."""
    original: Any = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    original.to(torch.bfloat16).save_pretrained(tmp_path)
    shape = model_shape(tmp_path)
    active, visit = (VISITS | {"tied_embedding": TIED})[name]
    settings = MemorySettings(method="rotary", engine="none", seq_len=tokens, gradient_checkpointing=checkpointing)
    moments = moments_of_step(shape, settings, with_sizes(visit, shape))
    before, forward, backward = step_peaks(tmp_path, active, checkpointing, tokens)
    static = sum(moments[FORWARD_MOMENT][kind] for kind in ("weights", "statistics", "other_weights", "adapters"))
    assert before == pytest.approx(static, rel=0.01)

    def planned(*names: str) -> int:
        most = max(sum(moments[moment].values()) for moment in names)
        return most - static - moments[FORWARD_MOMENT]["optimizer"] - CUBLAS_BYTES

    last = planned(NORM_MOMENT, LAYER_MOMENT, FIRST_LAYER_MOMENT, END_MOMENT)
    assert backward - before == pytest.approx(last, rel=0.05)
    if tokens == TOKENS:  # the weight that is dequantised within a product is not seen, and counts with few tokens
        assert forward - before == pytest.approx(planned(FORWARD_MOMENT, HEAD_FETCH_MOMENT), rel=0.05)
