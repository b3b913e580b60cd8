"""LoRA over quantized layers against stock PEFT: same initial values, outputs, gradients and files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from hf_fsdp_qlora import linear
from hf_fsdp_qlora.allocation import materialize
from hf_fsdp_qlora.lora import QuantizedLoraLinear, add_adapter, initialize_adapters
from hf_fsdp_qlora.lora_config import targeted_modules
from hf_fsdp_qlora.sharding import apply_fsdp2
from tests.distributed import run_distributed
from tests.lora_models import (
    SEED,
    TOKENS,
    assert_same_tensors,
    fill_base,
    gradients,
    load_with_adapter,
    meta_model,
    stock_model,
)
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, biases on q, k and v."""
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


CONFIGS = {
    "all-linear": LoraConfig(target_modules="all-linear"),
    "default targets": LoraConfig(),
    "list": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, use_rslora=True),
    "regex": LoraConfig(target_modules=r".*\.1\.(self_attn|mlp)\.(k_proj|up_proj)"),
    "patterns": LoraConfig(
        target_modules="all-linear", rank_pattern={"q_proj": 2, r"0\.mlp.*": 16}, alpha_pattern={"up_proj": 3}
    ),
    "gaussian": LoraConfig(target_modules="all-linear", init_lora_weights="gaussian", exclude_modules=["k_proj"]),
    "orthogonal": LoraConfig(target_modules="all-linear", init_lora_weights="orthogonal"),
    "random B": LoraConfig(target_modules=["v_proj"], init_lora_weights=False, layers_to_transform=[1]),
    "lora bias": LoraConfig(target_modules=["q_proj"], lora_bias=True, init_lora_weights=False),
    "saved modules": LoraConfig(target_modules="all-linear", modules_to_save=["lm_head", "embed_tokens", "norm"]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_initial_values_equal_stock_peft_bit_for_bit(llama: Path, config: LoraConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    ours = load_with_adapter(llama, config, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
    stock = stock_model(llama, config, dtype=dtype, quantized=False)
    ours_state, stock_state = get_peft_model_state_dict(ours), get_peft_model_state_dict(stock)
    assert_same_tensors(ours_state, stock_state)
    assert {value.dtype for value in ours_state.values()} == {torch.float32}
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in stock.named_parameters() if parameter.requires_grad}
    if config.modules_to_save is None:
        assert any(isinstance(module, QuantizedLoraLinear) for module in ours.modules())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_outputs_and_gradients_equal_stock_qlora(qwen2: Path, dtype: torch.dtype, autocast: bool) -> None:
    """Stock: PEFT's layer over Linear4bit. The same rows and the same order of operations, so no tolerance."""
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.2)
    ours = load_with_adapter(qwen2, config, dtype=dtype).train()
    stock = stock_model(qwen2, config, dtype=dtype, quantized=True).train()
    logits, losses = [], []
    for model in (ours, stock):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(input_ids=TOKENS, labels=TOKENS)
        output.loss.backward()
        logits.append(output.logits)
        losses.append(output.loss)
    assert torch.equal(logits[0], logits[1])
    assert_same_tensors(gradients(ours), gradients(stock))
    assert {gradient.dtype for gradient in gradients(ours).values()} == {torch.float32}


@pytest.mark.parametrize("autocast", [False, True])
def test_fused_adapters_equal_peft_within_rounding(
    qwen2: Path, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update joins the product's sum instead of being rounded by itself: the tolerance is the dtype's rounding
    over two layers; with q, k and v biases, which the fused product adds too."""
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = load_with_adapter(qwen2, config, dtype=torch.float32).train()
    calls: list[Any] = []
    product = linear.apply_lora_linear

    def count(*args: Any) -> Any:
        calls.append(args)
        return product(*args)

    monkeypatch.setattr(linear, "apply_lora_linear", count)
    results = []
    for fuse in (True, False):
        monkeypatch.setattr(QuantizedLoraLinear, "fuse", fuse)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(input_ids=TOKENS, labels=TOKENS)
        output.loss.backward()
        results.append((output.logits, gradients(model)))
    limit = 3e-2 if autocast else 1e-5
    (logits, fused), (expected, plain) = results
    assert len(calls) == len([module for module in model.modules() if isinstance(module, QuantizedLoraLinear)])
    assert (logits - expected).norm() < limit * expected.norm()
    for name, gradient in plain.items():
        assert (fused[name] - gradient).norm() < limit * gradient.norm(), name


def test_bf16_adapters_have_that_dtype_everywhere(qwen2: Path) -> None:
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], bias="lora_only")
    model = load_with_adapter(qwen2, config, adapter_dtype=torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert len(gradients(model)) == len(trained)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_trained_biases_equal_stock(tmp_path: Path, name: str, bias: Literal["all", "lora_only"]) -> None:
    """GPT-NeoX has biases on layer norms, too. Values, names, saved keys and the output are stock PEFT's."""
    path = save_tiny_model(tmp_path / name, name)
    config = LoraConfig(target_modules="all-linear", bias=bias, init_lora_weights=False)
    ours = load_with_adapter(path, config)
    stock = stock_model(path, config, quantized=True)
    assert_same_tensors(get_peft_model_state_dict(ours), get_peft_model_state_dict(stock))
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained.keys() == {name for name, parameter in stock.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    output = ours(input_ids=TOKENS, labels=TOKENS)
    assert torch.equal(output.logits, stock(input_ids=TOKENS).logits)
    output.loss.backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients(ours).values())


@pytest.mark.parametrize("model_name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["input_layernorm"]])
def test_saved_modules_hold_fp32_masters_and_compute_in_the_model_dtype(
    tmp_path: Path, model_name: str, saved: list[str]
) -> None:
    """Stock PEFT keeps the copies in bf16; a master that was only copied must compute exactly the same."""
    path = save_tiny_model(tmp_path, model_name)
    config = LoraConfig(target_modules="all-linear", modules_to_save=saved, init_lora_weights=False)
    ours, stock = load_with_adapter(path, config), stock_model(path, config, quantized=True)
    output = ours(input_ids=TOKENS, labels=TOKENS)
    assert torch.equal(output.logits, stock(input_ids=TOKENS).logits)
    output.loss.backward()
    masters = {name: gradient for name, gradient in gradients(ours).items() if "modules_to_save.default" in name}
    assert masters and {gradient.dtype for gradient in masters.values()} == {torch.float32}


def test_ensure_weight_tying_trains_one_copy(qwen2: Path) -> None:
    config = LoraConfig(target_modules="all-linear", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = load_with_adapter(qwen2, config)
    base: Any = model.get_base_model()
    embedding = base.get_input_embeddings().modules_to_save["default"]
    head = base.lm_head.modules_to_save["default"]
    assert head.weight is embedding.weight
    stock = stock_model(qwen2, config, quantized=False)
    assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(stock))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("config", [CONFIGS["all-linear"], CONFIGS["patterns"], CONFIGS["saved modules"]])
def test_saved_folder_is_what_stock_peft_writes(llama: Path, tmp_path: Path, config: LoraConfig) -> None:
    unchanged = copy.deepcopy(config)
    load_with_adapter(llama, config).save_pretrained(str(tmp_path / "ours"))
    assert config == unchanged, "the user's config was changed"
    stock_model(llama, config, quantized=False).save_pretrained(str(tmp_path / "stock"))
    ours, stock = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "stock"))
    for saved in (ours, stock):
        saved["target_modules"].sort()
    assert ours == stock
    assert ours["base_model_name_or_path"] == str(llama)
    assert_same_tensors(*(load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "stock")))


def test_merging_is_refused_and_names_merge_adapter(llama: Path) -> None:
    model = load_with_adapter(llama, CONFIGS["all-linear"])
    with pytest.raises(NotImplementedError, match="merge_adapter"):
        model.merge_and_unload()
    with pytest.raises(NotImplementedError, match="merge_adapter"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match="never merged"):
        model.unmerge_adapter()


def test_disabled_adapters_leave_the_base_model(llama: Path) -> None:
    model = load_with_adapter(llama, CONFIGS["lora bias"])
    adapted = model(input_ids=TOKENS).logits
    with model.disable_adapter():
        base = model(input_ids=TOKENS).logits
    assert not torch.equal(adapted, base)
    assert torch.equal(base, stock_model(llama, CONFIGS["all-linear"], quantized=True)(input_ids=TOKENS).logits)


def test_lora_layers_and_saved_modules_compile_without_graph_breaks(llama: Path) -> None:
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, modules_to_save=["lm_head"])
    model = load_with_adapter(llama, config)
    base: Any = model.get_base_model()
    hidden = torch.randn(2, 5, 96, dtype=torch.bfloat16)
    for module in (base.model.layers[0].self_attn.q_proj, base.lm_head):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(hidden), module(hidden))


def test_targeted_modules_are_those_that_peft_adapts(llama: Path) -> None:
    for config in CONFIGS.values():
        stock = stock_model(llama, config, quantized=False)
        assert targeted_modules(config, meta_model(llama)) == stock.base_model.targeted_module_names


def test_initial_values_do_not_depend_on_the_number_of_threads(llama: Path) -> None:
    """Launchers give a rank one thread where a single process has all, and the QR of 64 rows notices."""
    config = LoraConfig(r=64, target_modules=["q_proj"], init_lora_weights="orthogonal")
    states, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        states.append(get_peft_model_state_dict(load_with_adapter(llama, config)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert_same_tensors(*states)


def run_sharded(path: Path, config: LoraConfig, dtype: torch.dtype) -> tuple[dict[str, list], list[float]]:
    """Initialise and run a sharded model, the global generator different on each rank.

    Returns:
        Trained parameter -> this rank's part of its initial value; all logits.
    """
    torch.manual_seed(100 + torch.distributed.get_rank())
    base = meta_model(path, dtype, storage_dtype=torch.float32)
    modules, layers = dict(base.named_modules()), list(base.get_decoder().layers)
    model = add_adapter(base, config)
    apply_fsdp2(model, layers, mesh=init_device_mesh("cpu", (2,)), dtype=dtype)
    materialize(model, torch.device("cpu"))
    fill_base(modules, path, dtype)
    initialize_adapters(model, SEED)
    parts = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter, DTensor) and parameter.dtype == torch.float32
            parts[name] = parameter.to_local().tolist()
    output = model(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    return parts, output.logits.flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        # Ranks that some shard has no row of, and saved modules inside and outside the decoder layers.
        ("llama", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, rank_pattern={"q_proj": 1},
                             modules_to_save=["lm_head", "input_layernorm"])),
        # Trained biases beside the rows, and one trained copy of a tied weight.
        ("qwen2", LoraConfig(target_modules="all-linear", init_lora_weights=False, bias="all",
                             modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    ],
)  # fmt: skip
def test_two_ranks_start_from_the_values_of_one(
    tmp_path: Path, name: str, config: LoraConfig, dtype: torch.dtype
) -> None:
    path = save_tiny_model(tmp_path, name)
    model = load_with_adapter(path, config, dtype=dtype)
    results = run_distributed(run_sharded, path, config, dtype)
    whole = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert results[0][0].keys() == whole.keys()
    for parameter_name, value in whole.items():
        first, second = (torch.tensor(parts[parameter_name]) for parts, _ in results)
        dim = 0 if first.shape[1:] == value.shape[1:] else 1
        assert torch.equal(torch.cat([first, second], dim), value), parameter_name
    # Sharded adapters compute in the model's dtype; in one process those that have it do.
    reference = load_with_adapter(path, config, dtype=dtype, adapter_dtype=dtype)
    logits = reference(input_ids=TOKENS).logits.flatten().float()
    for _, sharded in results:
        assert torch.equal(torch.tensor(sharded), logits)
