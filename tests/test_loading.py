"""load_model on one process, DDP and FSDP2, against stock transformers + bitsandbytes. Bitwise unless said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_fsdp_qlora import QuantizedLinear, load_model
from tests.distributed import run_distributed
from tests.loading_story import ENGINES, FSDP2, LORA, batch, nf4, plain_name
from tests.tiny_models import ARCHITECTURES, save_tiny_model


def load_and_run(path: str, dtype: torch.dtype, config: BitsAndBytesConfig) -> tuple[dict[str, Tensor], float, Any]:
    model = load_model(path, quantization_config=config, peft_config=LORA, dtype=dtype)
    layers = {plain_name(n): m.dequantize() for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    return layers, model(**batch()).loss.item(), model.load_report


def stock(path: Path, dtype: torch.dtype, config: BitsAndBytesConfig) -> tuple[dict[str, Tensor], float]:
    config.bnb_4bit_compute_dtype = dtype
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype)
    layers = {
        name: bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    return layers, model(**batch()).loss.item()


def assert_equals_stock(path: Path, dtype: torch.dtype, config: BitsAndBytesConfig, engine: str) -> list[Any]:
    torch.set_num_threads(1)  # as the ranks have it: absmax.mean() depends on it
    expected, expected_loss = stock(path, dtype, config)
    world_size, env = ENGINES[engine]
    results = run_distributed(
        load_and_run, str(path), dtype, config, world_size=world_size, env=env, process_group=world_size > 1
    )
    for layers, loss, _ in results:
        assert layers.keys() == expected.keys()
        for name, weight in layers.items():
            assert torch.equal(weight, expected[name].reshape(weight.shape)), name
        # One machine, one kernel, the same order of sums: equal, not close.
        assert loss == expected_loss
    return [report for _, _, report in results]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama", shard_size="100KB")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_stock_bitsandbytes(name: str, engine: str, tmp_path: Path) -> None:
    assert_equals_stock(save_tiny_model(tmp_path, name), torch.bfloat16, nf4(), engine)


@pytest.mark.parametrize("source", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_source_dtype_is_cast_before_quantising(source: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "llama", dtype=source)
    assert_equals_stock(path, dtype, nf4(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False), "fsdp2")


def test_skip_modules_and_report(llama: Path) -> None:
    config = nf4(llm_int8_skip_modules=["lm_head", "down_proj"])
    reports = assert_equals_stock(llama, torch.bfloat16, config, "fsdp2")
    kept = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head")
    assert all(report.unquantized_linears == kept and report.quantized_layers == 12 for report in reports)
    stored = sum(file.stat().st_size for file in llama.glob("*.safetensors"))
    # Together the ranks read every tensor once; headers are the rest of the files.
    assert 0 <= stored - sum(report.read_bytes for report in reports) < 20_000
    assert all(report.sharded_bytes == report.total_bytes for report in reports)
    assert "lm_head" in reports[0].summary()


def load_and_backward(path: str, use_checkpointing: bool, targets: str | list[str]) -> dict[str, Tensor]:
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian")
    model = load_model(path, quantization_config=nf4(), peft_config=lora, dtype=torch.float32)
    torch.manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:  # zero at first, which would hide errors in A
            from hf_fsdp_qlora.sharding import write_full_tensor

            write_full_tensor(parameter, torch.randn(parameter.shape) * 0.05)
    if use_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    for _ in range(2):  # accumulation
        model(**batch()).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(grad, "full_tensor", lambda grad=grad: grad)() for name, grad in grads.items()}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "qv"])
@pytest.mark.parametrize("use_checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_of_two_ranks_equal_one_process(llama: Path, use_checkpointing: bool, targets: Any) -> None:
    args = (str(llama), use_checkpointing, targets)
    (expected,) = run_distributed(load_and_backward, *args, world_size=1, process_group=False)
    assert len(expected) == (28 if targets == "all-linear" else 8)
    for grads in run_distributed(load_and_backward, *args, env=FSDP2):
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            # Both ranks see the same batch: the mean of two equal gradients, exact in fp32.
            assert torch.equal(grad, expected[name]), name


def count_gathers(path: str) -> tuple[list[int], int]:
    """Bytes of every all-gather of float32 (of rows) in one step with checkpointing, and of one layer's rows."""
    model = load_model(path, quantization_config=nf4(), peft_config=LORA)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    gathers: list[int] = []
    original = DefaultAllGather.__call__

    def counting(self: Any, output_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if output_tensor.dtype == torch.float32:
            gathers.append(output_tensor.numel() * 4)
        return original(self, output_tensor, *args, **kwargs)

    DefaultAllGather.__call__ = counting  # type: ignore[method-assign]
    model(**batch()).loss.backward()
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)][:7]
    padded = [2 * -(-layer.num_rows // 2) * layer.backend.format.row_bytes for layer in layers]
    return gathers, sum(padded)


def test_rows_are_gathered_twice_a_step_with_checkpointing_and_nothing_else_with_them(llama: Path) -> None:
    for gathers, one_layer in run_distributed(count_gathers, str(llama), env=FSDP2):
        assert gathers == [one_layer] * 4  # two layers, once forward, once backward


def generate(path: str) -> tuple[list[int], float]:
    model = load_model(path, quantization_config=nf4(), peft_config=LORA, dtype=torch.float32)
    prompt = torch.tensor([[5, 6, 7]])
    return model.generate(input_ids=prompt, max_new_tokens=8)[0].tolist(), model.generation_config.repetition_penalty


def test_generate_works_sharded_and_generation_config_is_read(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen3")
    transformers.GenerationConfig(repetition_penalty=1.25, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path)
    alone = run_distributed(generate, str(tmp_path), world_size=1, process_group=False)
    both = run_distributed(generate, str(tmp_path), env=FSDP2)
    assert both == alone * 2 and alone[0][1] == 1.25


def test_single_file_wins_over_an_older_index_as_in_transformers(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, shard_size="100KB")
    whole = save_tiny_model(tmp_path / "whole") / "model.safetensors"
    tensors = {name: tensor + 1 if tensor.dim() == 1 else tensor for name, tensor in load_file(whole).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.norm.weight
    assert torch.equal(theirs, tensors["model.norm.weight"])
    assert torch.equal(load_model(tmp_path, quantization_config=nf4()).model.norm.weight, theirs)


def test_hub_id_is_read_from_the_cache_at_its_revision(llama: Path, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    repo = tmp_path / "models--someone--tiny"
    shutil.copytree(llama, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "v2").write_text(commit)
    options = dict(revision="v2", cache_dir=str(tmp_path), local_files_only=True)
    model = load_model("someone/tiny", quantization_config=nf4(), attn_implementation="eager", **options)
    assert model.config._attn_implementation == "eager" and model.config._name_or_path == "someone/tiny"
    with pytest.raises(OSError, match="main|connect|cache"):
        load_model("someone/tiny", **{**options, "revision": "main"})


def test_custom_code_runs_only_when_trusted(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "odd.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
        "class Odd(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path, quantization_config=nf4())
    model = load_model(tmp_path, quantization_config=nf4(), trust_remote_code=True)
    assert type(model).__name__ == "Odd" and model.load_report.quantized_layers == 14
