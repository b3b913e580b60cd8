"""The planner's arithmetic: what methods, formats, engines and placements cost, and what would make a run fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from hf_fsdp_qlora import checkpoint, host_memory, integrity, memory_host, memory_loading
from hf_fsdp_qlora.activations import (
    EMBEDDING_MOMENT,
    FORWARD_MOMENT,
    HEAD_FETCH_MOMENT,
    HEAD_FORWARD_MOMENT,
    HEAD_MOMENT,
    LAYER_MOMENT,
)
from hf_fsdp_qlora.commands.estimate import parse_size
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.memory_gathered import gathered_bytes, layer_weight_bytes
from hf_fsdp_qlora.memory_host import in_slabs
from hf_fsdp_qlora.memory_settings import MemorySettings, trainable_parameters
from hf_fsdp_qlora.memory_step import static_bytes
from hf_fsdp_qlora.memory_visits import rotary_visits
from hf_fsdp_qlora.model_shape import model_shape
from hf_fsdp_qlora.planning import cheapest_change, largest_batch_size, largest_seq_len
from tests.test_memory import LLAMA_8B, LLAMA_70B
from tests.tiny_models import make_config

GIB = 2**30


def test_estimate_agrees_with_two_stock_measurements() -> None:
    """8B-shaped Llama, stock QLoRA on an H200, r=16 all-linear, checkpointing, 2048 tokens, bf16 adapters: 6.6 GiB at
    batch 1 and 9.5 GiB at batch 4 (to the tenth)."""
    shape = model_shape(LlamaConfig(**LLAMA_8B))
    for batch_size, measured_gib in ((1, 6.6), (4, 9.5)):
        estimate = estimate_memory(shape, engine="none", adapter_dtype="bfloat16", batch_size=batch_size)
        assert estimate.peak_bytes / GIB == pytest.approx(measured_gib, rel=0.02)


def test_estimate_shards_and_offloads() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_70B))
    one, two = (estimate_memory(shape, gpus=gpus) for gpus in (1, 2))
    for kind in ("weights", "statistics", "other_weights", "adapters", "optimizer"):
        assert two.gpu[kind] == pytest.approx(one.gpu[kind] / 2, rel=1e-3)
    ddp = estimate_memory(shape, gpus=2, engine="ddp", gradient_accumulation_steps=2)
    assert ddp.gpu["weights"] == one.gpu["weights"]
    assert ddp.gpu["gradients"] == ddp.gpu["buckets"] == 4 * ddp.trainable_parameters
    base = estimate_memory(shape, gpus=2, offload="base")
    assert (base.gpu["weights"], base.gpu["statistics"]) == (0, 0)
    assert base.host["pinned"] >= base.host["offloaded"] == 2 * (two.gpu["weights"] + two.gpu["statistics"])
    everything = estimate_memory(shape, gpus=2, offload="all")
    assert everything.gpu["optimizer"] == 0
    assert everything.peak_bytes < base.peak_bytes < two.peak_bytes
    assert two.activations_other_bytes > two.gpu["activations"]


def test_planner_finds_the_largest_batch_and_a_change_that_fits() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_70B))
    settings = MemorySettings(gpus=2, seq_len=2048)
    card = 24 * GIB
    assert not estimate_memory(shape, settings).fits(card)
    found = cheapest_change(shape, settings, card)
    assert found is not None
    assert "host memory" in found[0]
    assert found[1].fits(card)
    changed = found[1].settings
    largest = largest_batch_size(shape, changed, card)
    assert estimate_memory(shape, changed, batch_size=largest).fits(card)
    assert not estimate_memory(shape, changed, batch_size=largest + 1).fits(card)
    longest = largest_seq_len(shape, changed, card)
    assert 2048 <= longest <= shape.max_positions
    assert cheapest_change(shape, settings, 2 * GIB) is None
    assert cheapest_change(shape, settings, card, host_memory_bytes=16 * GIB) != found


def test_planner_proposes_what_suits_the_method() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_8B))

    def change(gib: float, host_gib: float | None = None, **settings: Any) -> str:
        run = MemorySettings(**dict(dict(engine="none"), **settings))
        assert not estimate_memory(shape, run).fits(gib * GIB, host_gib and host_gib * GIB)
        found = cheapest_change(shape, run, gib * GIB, host_gib and host_gib * GIB)
        assert found is not None
        assert found[1].fits(gib * GIB, host_gib and host_gib * GIB)
        return found[0]

    assert "load_in_4bit" in change(12, method="lora")
    assert "4 bits in place of 8" in change(10, quant_format="int8")
    rotary = estimate_memory(shape, engine="none", method="rotary", active_fraction=0.1).needed_bytes / GIB
    assert "8-bit moments" in change(rotary - 2, method="rotary", active_fraction=0.1)
    both = change(rotary - 6, method="rotary", active_fraction=0.1)
    assert "8-bit moments" in both
    assert "bfloat16 masters" in both
    assert "on the GPUs" in change(24, host_gib=6, engine="fsdp2", offload="all")
    assert "host memory" in change(24, host_gib=64, engine="fsdp2", gpus=1, seq_len=2048, batch_size=1, lora_r=1024)


def test_formats_cost_what_their_rows_cost() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_8B))
    numel = sum(linear.numel for linear in shape.linears) * shape.num_layers
    sizes = {}
    for name in ("nf4", "fp4", "int8", "hqq"):
        gpu = estimate_memory(shape, engine="none", quant_format=name).gpu
        sizes[name] = (gpu["weights"] + gpu["statistics"]) / numel
    assert sizes["nf4"] == sizes["fp4"] == pytest.approx(0.5 + 264 / 16384)
    assert sizes["int8"] == pytest.approx(1 + 4 / 128)
    assert 0.5 < sizes["hqq"] < 0.6


def test_rotary_costs_what_its_parts_cost() -> None:
    """8B, a tenth active: at most the embedding or the head with a layer. Rows of parked linear layers, all that is
    parked otherwise in 16 bit, and per active parameter 2 bytes of weight, 2 of gradient, 4 of master, 8 of moments;
    the last two are divided over the ranks."""
    shape = model_shape(LlamaConfig(**LLAMA_8B))
    linears = sum(linear.numel for linear in shape.linears)
    common = MemorySettings(engine="none", method="rotary", active_fraction=0.1)
    active = shape.head_numel + shape.layer_numel + shape.outside_other_numel
    visit = next(visit for visit in rotary_visits(shape, 0.1) if visit.head)
    assert visit.numel == active == trainable_parameters(shape, common) < 0.1 * shape.total_numel

    def held(**settings: Any) -> int:
        return sum(static_bytes(shape, replace(common, **settings), visit).values())

    plain = shape.embedding_numel + (shape.num_layers - 1) * shape.layer_other_numel
    parked = (shape.num_layers - 1) * linears
    assert held() == parked + parked // 32 + 2 * plain + (2 + 2 + 4 + 8) * active
    assert held(master_dtype="bfloat16") == held() - 4 * active
    assert held(master_dtype="bfloat16", optimizer="adamw_8bit") == held() - (4 + 6) * active
    assert held(rotary_frozen="nf4") < held()
    unquantised = 2 * parked + parked // 8192 * 4 + 2 * plain + 16 * active
    assert held(rotary_frozen="bf16") == pytest.approx(unquantised, rel=1e-4)
    # FSDP2 keeps the rows of what is active, and has its part of them alone.
    sharded = static_bytes(shape, replace(common, engine="fsdp2", gpus=4, rotary_frozen="bf16"), visit)
    assert sharded["weights"] == shape.num_layers * linears * 2 // 4
    assert sharded["other_weights"] == 2 * plain
    split = replace(common, engine="ddp", gpus=4)
    assert static_bytes(shape, split, visit)["adapters"] == 2 * active + 4 * -(-active // 4)
    assert static_bytes(shape, split, visit)["optimizer"] == 8 * -(-active // 4)
    # On the host: masters, the active ones as they were before the visit, and the next visit's in pinned memory.
    estimate = estimate_memory(shape, split)
    assert estimate.host["masters"] == 4 * (shape.total_numel + active)
    assert estimate.host["pinned"] == 4 * GIB and 0.5 * GIB < 4 * active / 4 < GIB
    assert estimate_memory(shape, split, active_fraction=1.0).host["pinned"] == 0
    assert estimate.disk["training_checkpoint"] == 4 * shape.total_numel + active * (4 + 8)
    loaded = static_bytes(shape, common)
    assert loaded["adapters"] == loaded["optimizer"] == 0
    assert loaded["weights"] + loaded["statistics"] == shape.num_layers * linears * 33 // 32


def test_new_layers_are_trained_whole_over_a_quantised_base() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_8B))
    base = estimate_memory(shape, engine="none", quant_format="nf4")
    new = estimate_memory(shape, engine="none", method="new_layers", new_layers=4)
    trained = 4 * shape.layer_numel
    assert new.trainable_parameters == trained
    assert new.gpu["weights"] == base.gpu["weights"] * 28 // 32
    frozen_originals = 4 * sum(linear.numel for linear in shape.linears) * 2
    assert new.gpu["other_weights"] == base.gpu["other_weights"] + frozen_originals
    assert (new.gpu["adapters"], new.gpu["optimizer"]) == (4 * trained, 8 * trained)
    with pytest.raises(ConfigError, match="set both or neither"):
        MemorySettings(method="new_layers")


def test_16_bit_lora_and_full_training_quantise_nothing() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_8B))
    lora = estimate_memory(shape, engine="none", method="lora")
    assert lora.gpu["statistics"] == 0
    assert lora.gpu["weights"] + lora.gpu["other_weights"] == 2 * shape.total_numel
    full = estimate_memory(shape, engine="none", method="full", optimizer="adamw_torch")
    assert (full.gpu["weights"], full.gpu["other_weights"]) == (0, 0)
    assert full.gpu["adapters"] == full.gpu["gradients"] == 2 * shape.total_numel


def test_stored_four_bit_needs_less_while_it_loads_and_on_disk() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_70B))
    quantizing, stored = (estimate_memory(shape, engine="none", prequantized=stored) for stored in (False, True))
    assert stored.loading_peak_bytes < quantizing.loading_peak_bytes
    assert stored.peak_bytes == quantizing.peak_bytes
    assert stored.disk["base_checkpoint"] < 0.3 * quantizing.disk["base_checkpoint"]
    with pytest.raises(ConfigError, match="prequantized"):
        MemorySettings(prequantized=True, quant_format="hqq")


def test_loading_holds_one_tensor_and_little_more() -> None:
    """A 70B over two ranks: the largest slice is half of a 28672 x 8192 weight, 224 MiB, and fits the read-ahead. An
    HQQ tensor is quantised whole, in float32 copies."""
    shape = model_shape(LlamaConfig(**LLAMA_70B))

    def above(**settings: Any) -> float:
        estimate = estimate_memory(shape, **settings)
        kept = sum(estimate.gpu[name] for name in ("weights", "statistics", "other_weights", "adapters"))
        return (estimate.loading_peak_bytes - kept) / 2**20

    # The checked layer's rows are gathered after the stream: they, their buffer and fingerprints are the peak.
    rows = layer_weight_bytes(shape, MemorySettings()) / 2**20
    assert above(gpus=2) == pytest.approx(2 * rows + 64, rel=1e-3)
    assert 256 < above(engine="none") < 448 + 2 * 112 + 64
    largest = 28672 * 8192 / 2**20
    assert above(engine="none", quant_format="hqq") == pytest.approx((2 + 16) * largest, rel=0.01)
    assert above(engine="none", quant_format="int8") == pytest.approx((2 + 9) * largest, rel=0.01)


def test_a_card_must_hold_the_loading_too() -> None:
    """Everything offloaded and short sequences: what hqq needs for one tensor is the most there is."""
    shape = model_shape(LlamaConfig(**LLAMA_70B | dict(vocab_size=32000)))
    estimate = estimate_memory(shape, quant_format="hqq", offload="all", seq_len=256)
    assert estimate.loading_peak_bytes > estimate.peak_bytes
    assert estimate.needed_bytes == estimate.loading_peak_bytes + estimate.overhead_bytes
    assert not estimate.fits(estimate.loading_peak_bytes)


def test_gathered_bytes_follow_the_engine() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_8B))
    rows = layer_weight_bytes(shape, MemorySettings())
    head = (shape.head_numel + shape.outside_other_numel) * 2
    embedding = shape.embedding_numel * 2

    def moments(**settings: Any) -> dict[str, int]:
        return gathered_bytes(shape, MemorySettings(**settings))

    assert set(moments(engine="none").values()) == set(moments(engine="ddp", gpus=2).values()) == {0}
    one, two, fsdp1 = moments(), moments(gpus=2), moments(gpus=2, engine="fsdp1")
    assert (one[FORWARD_MOMENT], two[FORWARD_MOMENT], fsdp1[FORWARD_MOMENT]) == (
        rows,
        2 * rows,
        head + embedding + rows,
    )
    assert (one[HEAD_MOMENT], two[HEAD_MOMENT], fsdp1[HEAD_MOMENT]) == (head, head, head + embedding + rows)
    assert (two[HEAD_FETCH_MOMENT], two[HEAD_FORWARD_MOMENT]) == (2 * head + rows, 2 * head)
    assert moments(offload="all")[HEAD_FETCH_MOMENT] == 2 * head
    assert rows < one[LAYER_MOMENT] < two[LAYER_MOMENT] < 1.1 * rows
    assert moments(gpus=2, method="lora")[LAYER_MOMENT] > 2 * layer_weight_bytes(shape, MemorySettings(method="lora"))
    assert moments(gpus=4, replicas=4) == one
    assert moments(gpus=2, method="rotary")[HEAD_MOMENT] == 0
    assert estimate_memory(shape, gpus=4, replicas=2).gpu["weights"] == estimate_memory(shape, gpus=2).gpu["weights"]
    with pytest.raises(ConfigError, match="replicas=3"):
        MemorySettings(gpus=4, replicas=3)


def test_pinned_memory_comes_in_slabs_and_fsdp1_holds_the_model_on_its_first_rank() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_70B))
    base = estimate_memory(shape, gpus=2, offload="base")
    assert base.host["offloaded"] <= base.host["pinned"] < base.host["offloaded"] + 2 * GIB
    assert in_slabs(5 * GIB + 3) == 5 * GIB + 4
    fsdp1, fsdp2 = (estimate_memory(shape, gpus=2, engine=engine) for engine in ("fsdp1", "fsdp2"))
    whole = 2 * sum(fsdp2.gpu[name] for name in ("weights", "statistics", "other_weights", "adapters"))
    assert fsdp1.host["loading"] - fsdp2.host["loading"] == pytest.approx(whole, rel=1e-3)


def test_planner_knows_the_sizes_that_the_loader_uses() -> None:
    """They are written twice, because the planner must not import torch."""
    assert memory_loading.LOOKAHEAD_BYTES == checkpoint.LOOKAHEAD_BYTES
    assert memory_loading.ROWS_AT_ONCE == integrity.ROWS_AT_ONCE
    assert memory_host.SLAB_BYTES == host_memory.SLAB_BYTES


def test_dropout_keeps_more_and_unpadded_less() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_8B))
    plain = estimate_memory(shape, engine="none")
    assert estimate_memory(shape, engine="none", lora_dropout=0.1).peak_bytes > plain.peak_bytes
    assert estimate_memory(shape, engine="none", padded=True).peak_bytes > plain.peak_bytes


def test_planner_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="(?s)method.*optimizer"):
        MemorySettings(method="magic", optimizer="magic")
    with pytest.raises(ConfigError, match="matches nothing"):
        estimate_memory(make_config("llama"), engine="none", target_modules=["query"])
    with pytest.raises(ConfigError, match="score"):
        estimate_memory(make_config("llama"), engine="none", modules_to_save=["score"])
    assert (parse_size("24GiB"), parse_size("80 GB"), parse_size("2")) == (24 * GIB, 80 * 10**9, 2 * GIB)
    with pytest.raises(ConfigError, match="24GiB"):
        parse_size("24 bananas")


def test_estimate_command_prints_json_and_says_whether_it_fits(tmp_path, capsys) -> None:
    import argparse

    from hf_fsdp_qlora.commands import estimate

    LlamaConfig(**LLAMA_70B).save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    estimate.register(parser.add_subparsers())
    line = ["estimate", str(tmp_path), "--gpus", "2", "--gpu-memory", "24GiB", "--seq-len", "2048"]
    assert estimate.run(parser.parse_args([*line, "--json"])) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["fits"]
    assert "host memory" in answer["cheapest_change"]
    assert sum(answer["gpu"].values()) == answer["peak_bytes"]
    assert estimate.run(parser.parse_args([*line, "--offload", "all"])) == 0
    assert "fits a card" in capsys.readouterr().out


def test_planner_arithmetic_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, hf_fsdp_qlora.memory_settings, hf_fsdp_qlora.commands.estimate, hf_fsdp_qlora.memory; "
        "print('hf_fsdp_qlora.memory', *{'torch', 'transformers'} & sys.modules.keys())"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["hf_fsdp_qlora.memory"]


WHOLE: dict[str, Any] = dict(replicate_head=True, embedding_on_host=True)


def test_a_whole_head_and_an_embedding_on_the_host_save_what_is_gathered() -> None:
    """70B, 128,256 words, two ranks: neither the head nor the embedding is there twice, and 512 tokens fit 24 GiB."""
    shape = model_shape(LlamaConfig(**LLAMA_70B))
    head, embedding = (shape.head_numel + shape.outside_other_numel) * 2, shape.embedding_numel * 2
    run: dict[str, Any] = dict(gpus=2, seq_len=512)
    sharded, whole = estimate_memory(shape, **run), estimate_memory(shape, **run, **WHOLE)
    assert (whole.gpu["replicated"], whole.gpu["other_weights"]) == (
        head,
        sharded.gpu["other_weights"] - (head + embedding) // 2,
    )
    assert whole.host["embedding"] == 2 * embedding
    assert whole.host_needed_bytes - sharded.host_needed_bytes == 2 * embedding
    fetched = sharded.moments[HEAD_FETCH_MOMENT] - whole.moments[HEAD_FETCH_MOMENT]
    rows = layer_weight_bytes(shape, MemorySettings())
    adapters = estimate_memory(shape, **run).trainable_parameters // shape.num_layers * 2
    assert fetched == 2 * head + rows - adapters - (head - embedding) // 2
    # One alone is not enough: the other is fetched through a buffer.
    alone = [estimate_memory(shape, **run, **dict[str, Any]({name: True})) for name in WHOLE]
    assert [one.highest_moment for one in alone] == [EMBEDDING_MOMENT, HEAD_FETCH_MOMENT]
    assert whole.fits(24 * GIB) and not any(one.fits(24 * GIB) for one in (*alone, sharded))
    assert estimate_memory(shape, **run, **WHOLE, offload="all").gpu["replicated"] == head
    assert estimate_memory(shape, gpus=1, **WHOLE).moments[HEAD_FETCH_MOMENT] < estimate_memory(shape).peak_bytes


def test_planner_proposes_a_whole_head_before_offload() -> None:
    shape = model_shape(LlamaConfig(**LLAMA_70B))
    found = cheapest_change(shape, MemorySettings(gpus=2, seq_len=512), 24 * GIB)
    assert found is not None and "replicate_head: true, embedding_on_host: true" in found[0]
    assert found[1].settings == MemorySettings(gpus=2, seq_len=512, **WHOLE)
    tied = model_shape(LlamaConfig(**LLAMA_70B | dict(tie_word_embeddings=True)))
    for refused in (
        cheapest_change(tied, MemorySettings(gpus=2, seq_len=512), 22 * GIB),
        cheapest_change(shape, MemorySettings(gpus=2, seq_len=512, modules_to_save=("lm_head",)), 24 * GIB),
    ):
        assert refused is not None and "replicate_head" not in refused[0]
    # On 16 ranks a whole head is more than is gathered: a series leaves it out.
    many = MemorySettings(gpus=8, nodes=2, seq_len=8192)
    for card in (8, 9, 10):
        change = cheapest_change(shape, many, card * GIB)
        assert change is None or "the head whole on every GPU (" not in change[0].split("; ")
    # What takes nothing by itself may be needed once something else has lowered the peak; what is not is left out.
    small = model_shape(LlamaConfig(**LLAMA_8B))
    full = MemorySettings(method="full", engine="ddp", gpus=8, seq_len=512, gradient_checkpointing=False)
    offloaded = MemorySettings(method="lora", gpus=2, batch_size=8, seq_len=8192)
    for settings, card, words in (
        (full, 12, ["gradient checkpointing", "shard with FSDP2"]),
        (offloaded, 6, ["a batch of 1", "keep all parameters"]),
    ):
        change = cheapest_change(small, settings, card * GIB)
        assert change is not None and change[1].fits(card * GIB)
        found_words = change[0].split("; ")
        assert len(found_words) == len(words)
        assert all(each.startswith(start) for each, start in zip(found_words, words, strict=True))
    for values in (dict(engine="fsdp1", gpus=2), dict(engine="fsdp2", method="rotary"), dict(engine="none")):
        with pytest.raises(ConfigError, match="replicate_head needs FSDP2"):
            MemorySettings(**values, **WHOLE)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not tied"):
        estimate_memory(tied, gpus=2, **WHOLE)
    with pytest.raises(ConfigError, match="would not be sharded"):
        estimate_memory(shape, gpus=2, modules_to_save=("lm_head",), **WHOLE)


def test_offloaded_activations_are_on_the_host() -> None:
    """All but six of the layers' inputs, 32 MiB each; 70B with 128,256 words and 2,048 tokens fits 24 GiB so."""
    shape = model_shape(LlamaConfig(**LLAMA_70B))
    run: dict[str, Any] = dict(gpus=2, seq_len=2048, **WHOLE)
    kept, offloaded = estimate_memory(shape, **run), estimate_memory(shape, **run, activation_offloading=True)
    one = 2048 * shape.hidden_size * 2
    assert kept.moments[LAYER_MOMENT] - offloaded.moments[LAYER_MOMENT] == (shape.num_layers - 6) * one
    assert offloaded.host_needed_bytes - kept.host_needed_bytes == 2 * shape.num_layers * one
    assert offloaded.fits(24 * GIB) and not kept.fits(24 * GIB)
    with pytest.raises(ConfigError, match="without gradient_checkpointing"):
        MemorySettings(activation_offloading=True, gradient_checkpointing=False)
