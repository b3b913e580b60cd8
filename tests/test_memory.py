"""The planner: counts against meta models, bytes against real rows, activations against a replay of the operators.

The replay runs transformers' own model with this package's layers on fake tensors (shapes without values) and follows
every allocation and release, so what it calls the peak is what an allocator would see, custom kernels' inner buffers
aside; those it adds. Fake tensors count as traced, so transformers builds attention masks: padded=True.
"""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from hf_fsdp_qlora import checkpoint, host_memory, integrity, memory_host, memory_loading
from hf_fsdp_qlora.activations import (
    FORWARD_MOMENT,
    HEAD_FETCH_MOMENT,
    HEAD_MOMENT,
    LAYER_MOMENT,
    NORM_MOMENT,
    StepSettings,
    activations,
    layer_bytes,
)
from hf_fsdp_qlora.commands.estimate import parse_size
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.lora import add_adapter
from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.memory_gathered import gathered_bytes, layer_weight_bytes
from hf_fsdp_qlora.memory_host import in_slabs
from hf_fsdp_qlora.memory_settings import MemorySettings, trainable_parameters
from hf_fsdp_qlora.model_shape import model_shape, shape_of
from hf_fsdp_qlora.planning import cheapest_change, largest_batch_size, largest_seq_len
from hf_fsdp_qlora.quantization import backend_for_config
from hf_fsdp_qlora.quantization.bitsandbytes import dynamic_map
from hf_fsdp_qlora.skeleton import replace_linears
from tests.tiny_models import ARCHITECTURES, make_config

GIB = 2**30
LLAMA_8B: dict[str, Any] = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192,
)  # fmt: skip
LLAMA_70B: dict[str, Any] = dict(
    LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)


def meta_model(config) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "8b", "70b"])
def test_counts_equal_the_meta_model(name: str) -> None:
    config = {"8b": LlamaConfig(**LLAMA_8B), "70b": LlamaConfig(**LLAMA_70B)}.get(name) or make_config(name)
    model = meta_model(config)
    shape = shape_of(model, name)
    assert shape.total_numel == sum(parameter.numel() for parameter in model.parameters())
    settings = MemorySettings(lora_r=4, engine="none")
    backend = backend_for_config(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True), torch.bfloat16)
    replace_linears(model, backend, skip_modules=None, storage_dtype=torch.uint8)
    adapted = add_adapter(model, LoraConfig(r=4, target_modules="all-linear"))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trainable_parameters(shape, settings) == sum(parameter.numel() for parameter in trained)
    estimate = estimate_memory(shape, settings)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert estimate.gpu["weights"] == sum(layer.weight.numel() for layer in layers)
    assert estimate.gpu["statistics"] == sum(layer.weight_stats.numel() for layer in layers)
    packed = {id(p) for layer in layers for p in (layer.weight, layer.weight_stats)}
    frozen = [p for p in adapted.parameters() if not p.requires_grad and id(p) not in packed]
    assert estimate.gpu["other_weights"] == sum(parameter.numel() * 2 for parameter in frozen)


class PeakTracker(TorchDispatchMode):
    """Bytes in storages that operators create, the most at one time."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.sizes, self.now, self.peak = known, dict[int, int](), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inner = 0
        if "quantized_linear" in str(function):
            out_features, in_features = [x for x in args if isinstance(x, int)][-2:]
            inner = out_features * in_features * 2 + out_features * in_features // 64 * 4
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and key not in self.known:
                    self.sizes[key] = storage.nbytes()
                    self.now += self.sizes[key]
                    weakref.finalize(storage, self._release, key)
        self.peak = max(self.peak, self.now + inner)
        return result

    def _release(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


class _Loss(torch.autograd.Function):
    """Stands for the head: its gradient arrives, nothing of it is kept."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.like = hidden.shape, hidden.dtype
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return torch.empty(ctx.like[0], dtype=ctx.like[1])


def replayed_peak(config, *, batch_size: int, seq_len: int, lora: LoraConfig, checkpointing: bool) -> int:
    """Peak bytes of activations in backward, the gradients of adapters included, the head left out."""
    model = meta_model(config)
    backend = backend_for_config(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True), torch.bfloat16)
    replace_linears(model, backend, skip_modules=None, storage_dtype=torch.uint8)
    adapted: Any = add_adapter(model, lora)
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    adapted.train()
    dynamic_map(torch.device("cpu"))  # cached: fake tensors could not make it
    with FakeTensorMode(allow_non_fake_inputs=True):
        adapted.to_empty(device="cpu")
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)
        tracker = PeakTracker({parameter.untyped_storage()._cdata for parameter in adapted.parameters()})
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = adapted.base_model.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            loss = _Loss.apply(hidden)
            del hidden
            tracker.peak = tracker.now
            loss.backward()
    return tracker.peak


def wide_config(name: str) -> Any:
    """An architecture at a size where activations are hundreds of MiB: four layers of a 1B model."""
    class_name, values = ARCHITECTURES[name]
    sizes = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16,
                 num_key_value_heads=4, head_dim=128, vocab_size=32000, sliding_window=4096,
                 max_position_embeddings=4096)  # fmt: skip
    return getattr(transformers, class_name)(**{**values, **{k: v for k, v in sizes.items() if k in values}})


RUNS: dict[str, dict[str, Any]] = {
    "short": dict(),
    "long": dict(seq_len=8192),
    "batch": dict(batch_size=4),
    "stored": dict(checkpointing=False),
    "attention_only": dict(targets=["q_proj", "v_proj"]),
    "attention_only_long": dict(targets=["q_proj", "v_proj"], seq_len=8192),
    "rank_64": dict(rank=64),
    "70b": dict(shape=LLAMA_70B),
}


def compare(config, *, batch_size=1, seq_len=2048, targets="all-linear", rank=16, checkpointing=True) -> float:
    """Predicted over replayed bytes."""
    lora = LoraConfig(r=rank, target_modules=targets)
    peak = replayed_peak(config, batch_size=batch_size, seq_len=seq_len, lora=lora, checkpointing=checkpointing)
    shape = model_shape(config)
    step = StepSettings(
        batch_size=batch_size, seq_len=seq_len, compute_bytes=2, lora=frozenset(shape.targeted(targets)),
        lora_r=rank, dropout=False, checkpointing=checkpointing, padded=True, quantized=True, block_size=64,
        trains_head=False, trains_base=False,
    )  # fmt: skip
    moments = activations(shape, step)
    return max(moments[LAYER_MOMENT].total_bytes, moments[NORM_MOMENT].total_bytes) / peak


@pytest.mark.parametrize("name", RUNS)
def test_activations_agree_with_the_replay(name: str) -> None:
    """Within 5 %, the planner's own goal. Gradients of adapters are in the replay only: at most 1 % here."""
    run = dict(RUNS[name])
    config = LlamaConfig(**{**LLAMA_8B, **run.pop("shape", {}), "num_hidden_layers": 4, "vocab_size": 32000})
    assert compare(config, **run) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_of_every_architecture_agree_with_the_replay(name: str) -> None:
    assert compare(wide_config(name)) == pytest.approx(1, abs=0.05)


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
    """Per parameter at 8B with a tenth active: rows of the parked nine tenths of the linear layers, all others in 16
    bit, 0.2 for weights, 0.2 for gradients, masters and moments of the tenth; both divided over the ranks."""
    shape = model_shape(LlamaConfig(**LLAMA_8B))
    total = shape.total_numel
    linears = shape.num_layers * sum(linear.numel for linear in shape.linears)
    common = dict(engine="none", method="rotary", active_fraction=0.1)

    def per_parameter(**settings: Any) -> float:
        gpu = estimate_memory(shape, **common | settings).gpu
        kinds = ("weights", "statistics", "other_weights", "adapters", "gradients", "optimizer")
        return sum(gpu[kind] for kind in kinds) / total

    parked = 0.9 * linears / total * (1 + 4 / 128) + 2 * (total - linears) / total
    assert per_parameter() == pytest.approx(parked + 0.2 + 0.2 + 0.4 + 0.8, rel=1e-4)
    assert per_parameter(master_dtype="bfloat16") == pytest.approx(parked + 0.4 + 0.8, rel=1e-4)
    smallest = per_parameter(master_dtype="bfloat16", optimizer="adamw_8bit")
    assert smallest == pytest.approx(parked + 0.4 + 0.2, rel=1e-4)
    assert per_parameter(rotary_frozen="nf4") < per_parameter() < per_parameter(rotary_frozen="bf16")
    split = estimate_memory(shape, **common | dict(engine="ddp", gpus=4))
    assert split.gpu["adapters"] == pytest.approx((0.2 + 0.4 / 4) * total, rel=1e-4)
    assert split.gpu["optimizer"] == pytest.approx(0.8 / 4 * total, rel=1e-4)
    assert split.host["masters"] == 4 * total


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
    assert (one[HEAD_MOMENT], two[HEAD_MOMENT], fsdp1[HEAD_MOMENT]) == (head, 2 * head, head + embedding)
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
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layer_bytes_of_a_plain_mlp_are_fewer() -> None:
    settings: dict[str, Any] = dict(
        batch_size=1, seq_len=128, compute_bytes=2, lora=frozenset(), lora_r=1, dropout=False, checkpointing=True,
        padded=False, quantized=True, block_size=64, trains_head=False, trains_base=False,
    )  # fmt: skip
    step = StepSettings(**settings)
    plain, gated = (layer_bytes(model_shape(wide_config(name)), step) for name in ("gpt_neox", "llama"))
    assert plain < gated
