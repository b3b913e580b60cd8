"""Compiling and recomputing layer by layer: same losses and gradients, and only the layers asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from transformers import PreTrainedModel

from hf_fsdp_qlora import load_model
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.layer_options import LayerCompiler, compile_layers, limit_checkpointing, set_layer_options
from hf_fsdp_qlora.quantization.bitsandbytes import FourBitBackend
from hf_fsdp_qlora.skeleton import decoder_layers
from tests.distributed import run_distributed
from tests.lora_models import TOKENS, gradients, load_with_adapter
from tests.tiny_models import save_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> PeftModel:
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    return load_with_adapter(save_tiny_model(tmp_path, "llama"), config, dtype=torch.float32).train()


def step(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def test_limited_checkpointing_recomputes_the_first_layers_only(model: PeftModel) -> None:
    base: Any = model.get_base_model()
    layers = decoder_layers(base)
    runs = [0] * len(layers)
    for index, layer in enumerate(layers):
        mlp = layer.get_submodule("mlp")

        def count(*_: object, index: int = index) -> None:
            runs[index] += 1

        mlp.register_forward_pre_hook(count)
    limit_checkpointing(base, layers, 1)
    expected = step(model)
    assert runs == [1] * len(layers)
    model.gradient_checkpointing_enable()
    loss, found = step(model)
    assert runs == [3] + [2] * (len(layers) - 1)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(found[name], gradient) for name, gradient in expected[1].items())
    model.gradient_checkpointing_disable()
    step(model)
    assert runs == [4] + [3] * (len(layers) - 1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_compiled_layers_compute_the_same(model: PeftModel, checkpointing: bool) -> None:
    """In float32: what differs is the order of sums in fused kernels."""
    expected = step(model)
    layers = decoder_layers(cast(PreTrainedModel, model.get_base_model()))
    torch._dynamo.reset()  # with transformers 5.17 both cases run the same code, compiled once
    compile_layers(layers)
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    loss, found = step(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
def test_layers_compiled_to_a_budget_compute_the_same(model: PeftModel, budget: float) -> None:
    """In float32, as above. With checkpointing asked for, which must not recompute a second time."""
    expected = step(model)
    base: Any = model.get_base_model()
    torch._dynamo.reset()
    options: Any = dict(engine="none", compiled=True, checkpointed=None, activation_budget=budget)
    set_layer_options(base, decoder_layers(base), **options)
    model.gradient_checkpointing_enable()
    loss, found = step(model)
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("budget", "recomputed"), [(0.0, 6), (1.0, 0)])
def test_budget_says_how_many_products_are_recomputed(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch, budget: float, recomputed: int
) -> None:
    """A layer has seven products. No gradient needs the result of the last one, so it is never computed again."""
    base: Any = model.get_base_model()
    layers = decoder_layers(base)
    torch._dynamo.reset()
    compile_layers(layers, activation_budget=budget)
    step(model)
    dequantized = 0
    dequantize = FourBitBackend.dequantize

    def count(*args: Any) -> Tensor:
        nonlocal dequantized
        dequantized += 1
        return dequantize(*args)

    monkeypatch.setattr(FourBitBackend, "dequantize", count)
    loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    assert dequantized == 7 * len(layers)
    dequantized = 0
    loss.backward()
    # The first layer's input has no gradient, so its first three products need none either.
    assert 0 <= (7 + recomputed) * len(layers) - dequantized <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(activation_budget=0.5), "Set compile_layers=True"),
        (dict(compiled=True, activation_budget=50), "activation_budget=50 is a share"),
        (dict(compiled=True, activation_budget=0.5, checkpointed=1), "Leave one of them out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(model: PeftModel, options: dict[str, Any], message: str) -> None:
    base: Any = model.get_base_model()
    given = dict(engine="none", compiled=False, checkpointed=None) | options
    with pytest.raises(ConfigError, match=message):
        set_layer_options(base, decoder_layers(base), **given)  # type: ignore[arg-type]


def test_a_budget_with_dropout_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)
    model = load_with_adapter(save_tiny_model(tmp_path, "llama"), config, dtype=torch.float32)
    layers = decoder_layers(cast(PreTrainedModel, model.get_base_model()))
    torch._dynamo.reset()
    compile_layers(layers, activation_budget=0.0)
    model.eval()(input_ids=TOKENS, use_cache=False)
    with pytest.raises(BackendCompilerFailed, match="Set lora_dropout and the model's own dropout to 0"):
        model.train()(input_ids=TOKENS, use_cache=False)


def test_load_model_takes_both_options(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "llama")
    model = load_model(folder, peft_config=LoraConfig(), fsdp="none", compile_layers=True, checkpoint_layers=1)
    base: Any = model.get_base_model()
    layers = decoder_layers(base)
    assert all(layer._compiled_call_impl is not None for layer in layers)
    base.gradient_checkpointing_enable()
    assert [layer.gradient_checkpointing for layer in layers] == [True] + [False] * (len(layers) - 1)


def graphs_under_ddp(path: str) -> int:
    """On a rank: for how many graphs the compiler is asked when two equal layers run under DDP."""
    config = LoraConfig(r=64, target_modules="all-linear")
    model: Any = load_model(path, peft_config=config, fsdp="none", compile_layers=True, activation_budget=0.0)
    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert adapter > 2 * torch.distributed._DEFAULT_FIRST_BUCKET_BYTES
    model.enable_input_require_grads()
    asked = 0

    def count(self: LayerCompiler, graph: Any, inputs: Any) -> Any:
        nonlocal asked
        asked += 1
        return graph.forward

    LayerCompiler.__call__ = count  # type: ignore[method-assign,assignment]
    parallel = torch.nn.parallel.DistributedDataParallel(model.train())
    parallel(input_ids=TOKENS, use_cache=False)
    return asked


def test_layers_are_whole_graphs_under_ddp(tmp_path: Path) -> None:
    """torch would end a graph where DDP's first bucket is full, at 1 MiB of adapters, and keep what passes there."""
    path = save_tiny_model(tmp_path, hidden_size=256, intermediate_size=4096)
    assert run_distributed(graphs_under_ddp, str(path), world_size=1) == [1]


def test_generation_compiles_nothing(model: PeftModel) -> None:
    """The cache of each layer would be a graph of its own, and after 8 of them torch compiles no layer any more."""
    base: Any = model.get_base_model()
    set_layer_options(base, decoder_layers(base), engine="none", compiled=True, checkpointed=None)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for generating in (model, base):
        assert generating.generate(input_ids=TOKENS, max_new_tokens=2, do_sample=False).shape == (2, 18)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_compiling_under_fsdp_is_refused(model: PeftModel) -> None:
    base: Any = model.get_base_model()
    with pytest.raises(ConfigError, match="compile_layers=True under fsdp2"):
        set_layer_options(base, decoder_layers(base), engine="fsdp2", compiled=True, checkpointed=None)


def test_impossible_counts_are_refused(model: PeftModel) -> None:
    base: Any = model.get_base_model()
    layers = decoder_layers(base)
    with pytest.raises(ConfigError, match=f"the model has {len(layers)} decoder layers"):
        limit_checkpointing(base, layers, len(layers) + 1)
    with pytest.raises(ConfigError, match="no checkpointing of their own"):
        limit_checkpointing(base, [torch.nn.Linear(2, 2)], 1)
