"""Layers that read one input and compute together when they are compiled, beside the same layers one by one.

The CPU takes the reference of `dequantize_wide`; the kernel that makes it pay is in test_wide_kernel.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch._functorch.autograd_function import autograd_function_apply

from hf_fsdp_qlora import load_model, siblings
from hf_fsdp_qlora.quantization import four_bit_kernel
from hf_fsdp_qlora.quantization.bitsandbytes import FourBitBackend
from hf_fsdp_qlora.sibling_ops import apply_lora_siblings
from tests.lora_models import SEED, TOKENS, bnb_config, gradients
from tests.tiny_models import save_tiny_model

Step = tuple[Tensor, dict[str, Tensor]]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine with the kernel. What joining sets for the process ends with the test."""
    monkeypatch.setattr(FourBitBackend, "joins", lambda self, wide: True)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=False):
        yield


def load(path: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    settings: dict[str, Any] = {"target_modules": "all-linear", "r": 8, "lora_alpha": 12} | lora
    model: Any = load_model(
        path, peft_config=LoraConfig(init_lora_weights=False, **settings), quantization_config=bnb_config(dtype),
        dtype=dtype, adapter_dtype=dtype, seed=SEED,
    )  # fmt: skip
    siblings.join_siblings(model, "default")
    return model.train()


def layers(model: PeftModel) -> Any:
    base: Any = model.get_base_model()
    return base.model.layers


def compiled(model: PeftModel) -> list[int]:
    """Trace each layer as one graph; what runs are torch's own operations, one by one.

    Returns:
        The number of products in every graph, as graphs are made: 7 of a layer whose linears compute alone.
    """
    products: list[int] = []
    aot_eager: Any = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        products.append(sum(node.target is autograd_function_apply for part in parts for node in part.graph.nodes))
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    for layer in layers(model):
        layer.compile(backend=backend, fullgraph=True)
    return products


def step(model: PeftModel) -> Step:
    model.zero_grad()
    tokens = TOKENS.to(model.device)
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    return output.logits.detach(), gradients(model)


def assert_close(own: Step, wanted: Step) -> None:
    """In float32, where only the order of a sum may differ: 1e-5 of the largest value."""
    assert own[1].keys() == wanted[1].keys()
    for name, value in {"logits": wanted[0], **wanted[1]}.items():
        ours = own[0] if name == "logits" else own[1][name]
        torch.testing.assert_close(ours, value, rtol=0, atol=1e-5 * float(value.abs().max()), msg=name)


def num_joined(model: nn.Module) -> int:
    return sum(getattr(module, "siblings", None) is not None for module in model.modules())


@pytest.mark.parametrize("product_bytes", [2**30, 0], ids=["one product", "a product each"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"], ids=["without biases", "with biases"])
def test_siblings_compute_what_they_compute_one_by_one(
    joined: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, product_bytes: int
) -> None:
    monkeypatch.setattr(siblings, "ONE_PRODUCT_BYTES", product_bytes)
    save_tiny_model(tmp_path, architecture)
    model = load(tmp_path)
    assert num_joined(model) == 2 * 5
    wanted = step(model)  # eager code computes one by one
    products = compiled(model)
    assert_close(step(model), wanted)
    assert {*products} == {4}, "query, key and value; o; gate and up; down"


def test_siblings_inside_checkpoints(joined: None, tmp_path: Path) -> None:
    """transformers 5.23 checkpoints inside of what is compiled, and torch is strict about what it traces there."""
    save_tiny_model(tmp_path)
    model = load(tmp_path)
    wanted = step(model)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    products = compiled(model)
    assert_close(step(model), wanted)
    assert {*products} == {4}


def up_first(mlp: Any, x: Tensor) -> Tensor:
    """As Falcon-H1 calls them."""
    up = mlp.up_proj(x)
    return mlp.down_proj(up * mlp.act_fn(mlp.gate_proj(x)))


def test_outputs_that_nobody_took_are_forgotten(joined: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    model = load(tmp_path)
    wanted = step(model)
    monkeypatch.setattr(type(layers(model)[0].mlp), "forward", up_first)
    compiled(model)
    assert_close(step(model), wanted)
    for layer in layers(model):
        kept = layer.mlp.gate_proj.siblings
        assert kept._input is None and kept._outputs is None


def test_bf16_siblings_are_as_far_from_float32_as_single_layers(joined: None, tmp_path: Path) -> None:
    """The reference is the same model in float32: the joined products round less often, not more."""
    save_tiny_model(tmp_path)
    exact, model = load(tmp_path), load(tmp_path, torch.bfloat16)
    for value, parameter in zip(exact.parameters(), model.parameters(), strict=True):
        if parameter.requires_grad:
            value.data.copy_(parameter.data)
        elif parameter.dtype == torch.uint8:
            assert torch.equal(parameter, value), "the same rows"
    expected = step(exact)[0]
    alone = (step(model)[0].float() - expected).norm()
    compiled(model)
    assert (step(model)[0].float() - expected).norm() <= 1.1 * alone


class CrossAttention(nn.Module):
    """Key and value read something else than query."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        attention = self.attention
        return attention.q_proj(x), attention.k_proj(other), attention.v_proj(other)


def test_layers_with_other_inputs_compute_alone(joined: None, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    model = load(tmp_path)
    module = CrossAttention(layers(model)[0].self_attn)
    x, other = (torch.randn(2, 5, 96, device=model.device) for _ in range(2))
    expected = module(x, other)
    traced: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    for output, wanted in zip(traced(x, other), expected, strict=True):
        torch.testing.assert_close(output, wanted)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 6), ({"target_modules": ["q_proj", "up_proj"]}, 7),
        ({"alpha_pattern": {"k_proj": 3, "up_proj": 3}}, 7), ({"rank_pattern": {"k_proj": 16}}, 6),
        ({"use_rslora": True}, 4),
    ],
    ids=["query and value, PEFT's choice", "one projection each", "other scalings", "other scaling by rank", "rslora"],
)  # fmt: skip
def test_which_layers_join(joined: None, tmp_path: Path, lora: dict[str, Any], expected: int) -> None:
    save_tiny_model(tmp_path)
    model = load(tmp_path, **lora)
    wanted = step(model)
    products = compiled(model)
    assert_close(step(model), wanted)
    assert products[-1] == expected, "the first layer's input has no gradient, and its frozen products none either"


def test_adapters_that_are_switched_off_or_rescaled_are_respected(joined: None, tmp_path: Path) -> None:
    """Each change of the adapters' state is another graph."""
    save_tiny_model(tmp_path)
    model = load(tmp_path)
    key = layers(model)[0].self_attn.k_proj
    wanted = []
    for traced in (False, True):
        if traced:
            products = compiled(model)
        logits = [step(model)[0]]
        with model.disable_adapter(), torch.no_grad():
            logits.append(model(input_ids=TOKENS.to(model.device), use_cache=False).logits)
        key.scaling["default"] *= 2
        logits.append(step(model)[0])
        key.scaling["default"] /= 2
        wanted.append(logits)
    for own, expected in zip(*wanted, strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert products[0] == 4 and 6 in products


def test_members_with_another_adapter_compute_alone(joined: None, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    model = load(tmp_path)
    again = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("other", again)
    key = layers(model)[0].self_attn.k_proj

    def key_alone() -> None:
        key.set_adapter("other")

    def another_rank() -> None:  # the same name and scaling
        model.set_adapter("other")
        model.delete_adapter("default")
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model.add_adapter("default", again)
        model.set_adapter("default")

    def some_layers() -> None:
        model.set_adapter("other")
        model.delete_adapter("default")
        model.add_adapter("default", LoraConfig(target_modules=["q_proj"], lora_alpha=12))
        model.set_adapter("default")

    for change in (key_alone, another_rank, some_layers):
        change()
        with torch.no_grad():
            wanted = model(input_ids=TOKENS, use_cache=False).logits
            compiled(model)
            own = model(input_ids=TOKENS, use_cache=False).logits
        for layer in layers(model):
            layer._compiled_call_impl = None
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_the_input_of_the_first_layer_needs_no_gradient(joined: None, tmp_path: Path) -> None:
    """Gradients of A and B are the same without one."""
    save_tiny_model(tmp_path)
    attention = layers(load(tmp_path))[0].self_attn
    tensors: list[Any] = []
    for member in attention.q_proj.siblings.members:
        base, adapter = member.base_layer, (member.lora_A["default"].weight, member.lora_B["default"].weight)
        tensors += [base.weight, base.weight_stats, base.bias, *adapter]
    x = torch.randn(2, 5, 96, device=tensors[0].device)
    found = []
    for needed in (True, False):
        outputs = apply_lora_siblings(x.clone().requires_grad_(needed), attention.q_proj.siblings.key, *tensors)
        trained = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        loss = torch.cat([output.flatten() for output in outputs]).square().sum()
        found.append(torch.autograd.grad(loss, trained))
    for own, expected in zip(*found, strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize(
    ("compile_layers", "here", "expected"), [(True, True, 10), (True, False, 0), (False, True, 0)]
)
def test_siblings_join_where_layers_are_compiled_and_their_weight_is_written_at_once(
    joined: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile_layers: bool, here: bool, expected: int
) -> None:
    monkeypatch.setattr(FourBitBackend, "joins", lambda self, wide: here)
    save_tiny_model(tmp_path)
    model = load_model(
        tmp_path, peft_config=LoraConfig(target_modules="all-linear"), quantization_config=bnb_config(),
        dtype=torch.bfloat16, compile_layers=compile_layers,
    )  # fmt: skip
    assert num_joined(model) == expected


def test_no_siblings_without_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit_kernel, "here", lambda: False)
    save_tiny_model(tmp_path)
    assert num_joined(load(tmp_path)) == 0


def test_weights_that_would_have_to_be_cast_are_not_joined(joined: None, tmp_path: Path) -> None:
    """A float32 model under bfloat16 autocast."""
    save_tiny_model(tmp_path)
    model = load(tmp_path)
    products = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        step(model)
    assert {*products} == {7}
