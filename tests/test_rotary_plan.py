"""Plan and schedule: every parameter in one block, every block as often as asked, the same visits everywhere."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.quantization import DenseConfig, LinearInt8Config
from hf_fsdp_qlora.rotary.config import ActiveLimit, RotaryConfig
from hf_fsdp_qlora.rotary.plan import Block, active_bytes, make_plan, plan_blocks
from hf_fsdp_qlora.rotary.schedule import Schedule
from tests.tiny_models import ARCHITECTURES, make_config

BLOCKS = tuple(Block(f"block {number}", "layer", (f"{number}",), 10 * (number + 1)) for number in range(5))


def model_of(name: str, **overrides: object) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(make_config(name, **overrides))
    model.tie_weights()
    return model


def shapes_of(model: transformers.PreTrainedModel) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("split", ["layer", "attention_mlp"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_in_one_block(name: str, split: str) -> None:
    model = model_of(name)
    shapes = shapes_of(model)
    blocks = plan_blocks(model, shapes, split)  # type: ignore[arg-type]
    assert Counter(name for block in blocks for name in block.parameters) == Counter(list(shapes))
    assert sum(block.numel for block in blocks) == sum(parameter.numel() for parameter in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    layers = ["layer"] * 2 if split == "layer" else ["attention", "mlp"] * 2
    assert [block.kind for block in blocks] == ["embedding", *layers, "norm"] + ["head"] * (not tied)
    assert len({block.name for block in blocks}) == len(blocks)


def test_halves_of_a_layer_have_their_biases_and_norms() -> None:
    model = model_of("qwen2")
    attention, mlp = plan_blocks(model, shapes_of(model), "attention_mlp")[1:3]
    assert {name.removeprefix("model.layers.0.") for name in attention.parameters} == {
        "input_layernorm.weight", "self_attn.o_proj.weight",
        *(f"self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")),
    }  # fmt: skip
    assert {name.removeprefix("model.layers.0.") for name in mlp.parameters} == {
        "post_attention_layernorm.weight", *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }  # fmt: skip


def test_tied_weights_are_one_block_under_either_name() -> None:
    model = model_of("llama", tie_word_embeddings=True)
    shapes = {name.replace("model.embed_tokens", "lm_head"): shape for name, shape in shapes_of(model).items()}
    assert "lm_head.weight" in shapes
    assert plan_blocks(model, shapes, "layer")[0] == Block("embedding", "embedding", ("lm_head.weight",), 259 * 96)


def test_buffers_of_the_checkpoint_are_not_trained() -> None:
    model = model_of("llama")
    model.model.layers[0].register_buffer("counter", torch.zeros(3))
    shapes = shapes_of(model)
    assert plan_blocks(model, {**shapes, "model.layers.0.counter": (3,)}, "layer") == plan_blocks(
        model, shapes, "layer"
    )


def test_a_model_whose_attention_has_another_name_cannot_be_split() -> None:
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mixer = layer.self_attn
        del layer.self_attn, layer.input_layernorm
    with pytest.raises(ConfigError, match="split='layer'"):
        plan_blocks(model, shapes_of(model), "attention_mlp")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (ActiveLimit(blocks=2), [(0, 1), (2, 3), (4,)]),
        (ActiveLimit(blocks=9), [(0, 1, 2, 3, 4)]),
        (ActiveLimit(fraction=0.4), [(0, 1, 2), (3,), (4,)]),  # 60 of 150
        (ActiveLimit(fraction=0.01), [(0,), (1,), (2,), (3,), (4,)]),
        (ActiveLimit(num_bytes=70 * 16), [(0, 1, 2), (3,), (4,)]),
        (ActiveLimit(fraction=1.0), [(0, 1, 2, 3, 4)]),
    ],
)
def test_visits_fill_the_limit(limit: ActiveLimit, expected: list[tuple[int, ...]]) -> None:
    plan = make_plan(BLOCKS, limit=limit, always_active=(), bytes_per_active=16)
    assert plan.visits(range(5)) == expected


def test_blocks_that_are_always_active_use_up_the_fraction_and_not_the_count() -> None:
    blocks = (Block("embedding", "embedding", ("e",), 50), *BLOCKS)
    plan = make_plan(blocks, limit=ActiveLimit(fraction=0.5), always_active=("embedding", "head"), bytes_per_active=1)
    assert (plan.always, plan.rotating) == ((0,), (1, 2, 3, 4, 5))
    assert plan.visits(plan.rotating) == [(1, 2), (3,), (4,), (5,)]  # 100 of 200, 50 of them taken
    plan = make_plan(blocks, limit=ActiveLimit(blocks=2), always_active=("embedding",), bytes_per_active=1)
    assert plan.visits(plan.rotating) == [(1, 2), (3, 4), (5,)]
    schedule = Schedule(plan, order="sequential", seed=0, coverage_floor=0)
    assert schedule.blocks_of_visit(1) == (0, 3, 4)
    with pytest.raises(ConfigError, match="no block to rotate"):
        make_plan(blocks[:1], limit=ActiveLimit(blocks=1), always_active=("embedding",), bytes_per_active=1)


def test_device_bytes_of_an_active_weight() -> None:
    assert active_bytes(2, 4) == 2 + 2 + 8 + 4  # bf16 weight and gradient, Adam's moments, fp32 master
    assert active_bytes(2, 2) == 2 + 2 + 8  # the master is the weight
    assert active_bytes(4, 4) == 4 + 4 + 8


def schedule(order: str, blocks: int = 2, seed: int = 0, floor: float = 0.5) -> Schedule:
    plan = make_plan(BLOCKS, limit=ActiveLimit(blocks=blocks), always_active=(), bytes_per_active=1)
    return Schedule(plan, order=order, seed=seed, coverage_floor=floor)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["random", "sequential", "reverse"])
def test_a_sweep_visits_every_block_once(order: str) -> None:
    visits = [schedule(order).blocks_of_visit(visit) for visit in range(9)]
    for sweep in range(3):
        assert sorted(block for blocks in visits[3 * sweep : 3 * sweep + 3] for block in blocks) == [0, 1, 2, 3, 4]
    assert schedule(order).visits_of_blocks(9) == {block.name: 3 for block in BLOCKS}


def test_visits_are_a_function_of_the_seed_and_the_number_of_the_visit() -> None:
    one, other = schedule("random"), schedule("random")
    expected = [one.blocks_of_visit(visit) for visit in range(12)]
    assert [other.blocks_of_visit(visit) for visit in reversed(range(12))] == expected[::-1]
    assert expected[:3] != expected[3:6], "every sweep has the same order"
    assert [schedule("random", seed=1).blocks_of_visit(visit) for visit in range(12)] != expected
    # In another process, with another hash seed, under another version of Python.
    assert expected[:3] == [(0, 3), (1, 4), (2,)]


def test_sequential_goes_up_and_reverse_goes_down() -> None:
    assert [schedule("sequential").blocks_of_visit(visit) for visit in range(4)] == [(0, 1), (2, 3), (4,), (0, 1)]
    assert [schedule("reverse").blocks_of_visit(visit) for visit in range(4)] == [(3, 4), (1, 2), (0,), (3, 4)]


def run_importance(drawing: Schedule, first: int, last: int) -> list[tuple[int, ...]]:
    """Visits with the next one drawn ahead, as prefetching does; block 4 has ten times the gradient of the others."""
    visits = []
    for visit in range(first, last):
        visits.append(drawing.blocks_of_visit(visit))
        drawing.blocks_of_visit(visit + 1)
        for block in visits[-1]:
            drawing.observe(block, 10.0 if block == 4 else 1.0)
    return visits


def test_importance_prefers_large_gradients_and_keeps_the_floor() -> None:
    drawing = schedule("importance", blocks=1)
    visits = run_importance(drawing, 0, 200)
    counts = drawing.visits_of_blocks(200)
    assert sorted(blocks[0] for blocks in visits[:5]) == [0, 1, 2, 3, 4]  # all are seen before any is preferred
    assert sum(counts.values()) == 200
    assert counts["block 4"] > 1.8 * 40 and min(counts.values()) >= 0.5 * 40 - 2  # 40 visits each on average
    free = schedule("importance", blocks=1, floor=0.0)
    run_importance(free, 0, 200)
    assert min(free.visits_of_blocks(200).values()) < 0.5 * 40 - 2, "the floor never held anything up"


def test_importance_goes_on_from_its_state() -> None:
    whole = schedule("importance")
    expected = run_importance(whole, 0, 20)
    begun, resumed = schedule("importance"), schedule("importance")
    run_importance(begun, 0, 7)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert run_importance(resumed, 7, 20) == expected[7:]
    assert schedule("random").state_dict() == {}


def test_coverage_counts_parameters_that_were_active() -> None:
    half = schedule("sequential")
    assert [half.coverage(visits) for visits in range(5)] == [0, 30 / 150, 100 / 150, 1, 1]
    assert half.visits_of_blocks(2) == {"block 0": 1, "block 1": 1, "block 2": 1, "block 3": 1, "block 4": 0}


def test_all_wrong_settings_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        RotaryConfig(
            active="110%", steps_per_block=0, order="backwards", frozen="int4", warmup_steps=3,  # type: ignore[arg-type]
            always_active=["layer"], coverage_floor=2.0,  # type: ignore[arg-type]
        )  # fmt: skip
    for word in ("active='110%'", "steps_per_block=0", "'backwards'", "'int4'", "warmup_steps=3", "['layer']", "=2.0"):
        assert word in str(caught.value)


@pytest.mark.parametrize("active", [0, -1, "0%", "ten", "2GB", "1.5", "0GiB", ""])
def test_what_active_cannot_be(active: int | str) -> None:
    with pytest.raises(ConfigError, match="no number of blocks"):
        RotaryConfig(active=active)


def test_what_active_can_be() -> None:
    assert RotaryConfig(active=3).limit == RotaryConfig(active="3").limit == ActiveLimit(blocks=3)
    assert RotaryConfig(active="12.5%").limit == ActiveLimit(fraction=0.125)
    assert RotaryConfig(active="1.5 GiB").limit == ActiveLimit(num_bytes=3 * 2**29)


def test_frozen_formats() -> None:
    assert isinstance(RotaryConfig().frozen_format, LinearInt8Config)
    nf4 = RotaryConfig(frozen="nf4").frozen_format
    assert isinstance(nf4, BitsAndBytesConfig) and nf4.bnb_4bit_quant_type == "nf4" and nf4.bnb_4bit_use_double_quant
    assert isinstance(RotaryConfig(frozen="bf16").frozen_format, DenseConfig)
    assert RotaryConfig(master_dtype="bfloat16").torch_master_dtype == torch.bfloat16
