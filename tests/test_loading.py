"""load_model on one process, DDP and FSDP2, against stock transformers + bitsandbytes. Bitwise unless said."""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from bitsandbytes import functional as bnb
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_fsdp_qlora import ConfigError, QuantizedLinear, load_model, loading
from hf_fsdp_qlora.integrity import IntegrityError, check_integrity
from tests.distributed import run_distributed
from tests.tiny_models import ARCHITECTURES, make_config, save_tiny_model

CPU = {"ACCELERATE_USE_CPU": "true"}
FSDP2 = {**CPU, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ENGINES = {"one process": (1, {}), "fsdp2": (2, FSDP2), "fsdp2, 3 ranks": (3, FSDP2), "ddp": (2, CPU)}
LORA = LoraConfig(r=4, target_modules="all-linear")


def nf4(**changes: Any) -> BitsAndBytesConfig:
    settings = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return BitsAndBytesConfig(**{**settings, **changes})


def batch() -> dict[str, Tensor]:
    ids = torch.arange(60).view(3, 20)
    return {"input_ids": ids, "labels": ids}


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


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


def damage_one_row(path: str) -> str:
    model = load_model(path, quantization_config=nf4(), peft_config=LORA)
    total = check_integrity(model)
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    if dist.get_rank() == 0:
        local = layer.weight.to_local().view(torch.uint8)
        local[0, 0] ^= 1
    with pytest.raises(IntegrityError, match="1 of") as caught:
        check_integrity(model)
    return f"{total} {caught.value}"


def test_one_changed_bit_is_found_on_every_rank(llama: Path) -> None:
    for message in run_distributed(damage_one_row, str(llama), env=FSDP2):
        assert message.split()[0] == str(2 * (4 + 3 * 2)) and "q_proj" in message


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


def load_own_path(paths: list[str]) -> str:
    with pytest.raises((ConfigError, RuntimeError, OSError)) as caught:
        load_model(paths[dist.get_rank()], quantization_config=nf4(), peft_config=LORA)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_error_on_one_rank_reaches_every_rank(llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    last = sorted(broken.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1000])
    first, second = run_distributed(load_own_path, [str(llama), str(broken)], env=FSDP2, timeout_s=60)
    assert first.startswith("RuntimeError") and "rank 1" in first and "truncated" in first
    assert second.startswith("ConfigError") and "Download it again" in second


def shrink_while_reading(path: str) -> str:
    from hf_fsdp_qlora import checkpoint

    if dist.get_rank() == 1:  # the file ends earlier than its header said, on this node only
        preadv = os.preadv

        def shorter(file: int, buffers: Any, offset: int) -> int:
            return 0 if offset > 50_000 else preadv(file, buffers, offset)

        checkpoint.os.preadv = shorter  # type: ignore[assignment]
    with pytest.raises((RuntimeError, OSError)) as caught:
        load_model(path, quantization_config=nf4(), peft_config=LORA)
    return f"{type(caught.value).__name__}: {caught.value}"


def run_out_of_memory(path: str, where: str, config: BitsAndBytesConfig) -> str:
    from hf_fsdp_qlora import loading
    from hf_fsdp_qlora import weights as stream
    from hf_fsdp_qlora.quantization.bitsandbytes import FourBitBackend

    calls = [0]
    stock = FourBitBackend.quantize

    def quantize(self: Any, weights: Tensor, numel: int, gather_rows: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3 and where == "before the gather":
            raise torch.OutOfMemoryError("no memory left")
        rows = stock(self, weights, numel, gather_rows)
        if calls[0] == 3 and where == "after the gather":
            raise torch.OutOfMemoryError("no memory left")
        return rows

    def materialize(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    def fingerprint(codes: Tensor, stats: Tensor) -> Tensor:
        if calls[0] >= 3 and len(codes):
            raise ValueError("no memory left")  # a backend's errors are of any type
        return made(codes, stats)

    made = stream.fingerprint
    if dist.get_rank() == 1:
        if where == "fingerprinting":
            stream.fingerprint = fingerprint
        if where == "allocating":
            loading.materialize = materialize
        FourBitBackend.quantize = quantize  # type: ignore[method-assign]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        load_model(path, quantization_config=config, peft_config=LORA)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("where", ["before the gather", "after the gather", "fingerprinting", "allocating"])
def test_out_of_memory_on_one_rank_hangs_nobody(llama: Path, where: str, nested: bool) -> None:
    config = nf4(bnb_4bit_use_double_quant=nested)
    first, second = run_distributed(run_out_of_memory, str(llama), where, config, env=FSDP2, timeout_s=60)
    assert "rank 1" in first and "no memory left" in first
    assert second == ("ValueError" if where == "fingerprinting" else "OutOfMemoryError") + ": no memory left"


def test_single_file_wins_over_an_older_index_as_in_transformers(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, shard_size="100KB")
    whole = save_tiny_model(tmp_path / "whole") / "model.safetensors"
    tensors = {name: tensor + 1 if tensor.dim() == 1 else tensor for name, tensor in load_file(whole).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.norm.weight
    assert torch.equal(theirs, tensors["model.norm.weight"])
    assert torch.equal(load_model(tmp_path, quantization_config=nf4()).model.norm.weight, theirs)


def test_quantised_model_without_an_adapter_refuses_to_be_saved(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama, quantization_config=nf4())
    with pytest.raises(ConfigError, match="hf-fsdp-qlora quantize"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_read_error_in_the_middle_of_the_stream_hangs_nobody(llama: Path) -> None:
    first, second = run_distributed(shrink_while_reading, str(llama), env=FSDP2, timeout_s=60)
    assert "rank 1" in first and "unexpected end of file" in first
    assert second.startswith("OSError")


def save_config(path: Path, config: transformers.PretrainedConfig) -> Path:
    config.save_pretrained(path)
    save_file({"x": torch.zeros(1)}, path / "model.safetensors", metadata={"format": "pt"})
    return path


TINY: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
REFUSED = {
    "experts": (transformers.MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=2), "fused experts"),
    "conv1d": (transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64), "Conv1D"),
    "encoder": (transformers.T5Config(d_model=32, num_layers=1, num_heads=2), "encoder-decoder"),
    "multimodal": (transformers.Gemma3Config(), "multimodal"),
    "quantised": (make_config("llama", quantization_config={"quant_method": "bitsandbytes"}), "quantised already"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_handled_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    config, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=message):
        load_model(save_config(tmp_path, config), quantization_config=nf4())


def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, file)
    with pytest.raises(ConfigError, match="lacks 1 weights .*layers.1.mlp.up_proj.weight"):
        load_model(tmp_path, quantization_config=nf4())
    save_file({**tensors, "model.norm.weight": torch.zeros(7)}, file)
    with pytest.raises(ConfigError, match=r"model.norm.weight: \(7,\) in the checkpoint, \(96,\) in the model"):
        load_model(tmp_path, quantization_config=nf4())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(quantization_config=nf4(bnb_4bit_quant_storage="bfloat16"), fsdp="fsdp2"), "needs a process group"),
        (dict(fsdp="fsdp1"), "FSDP1 needs a process group"),
        (dict(fsdp="zero3"), "use 'auto'"),
        (dict(offload="all"), "needs FSDP2"),
        (dict(offload="some"), "use 'none', 'base'"),
        (dict(dtype=torch.int8), "use bfloat16"),
        (dict(device_map="auto"), "device_map"),
        (dict(quantization_config=nf4(llm_int8_skip_modules=["model"])), "quantises nothing"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(llama: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(llama, **arguments)


def refuse_storage(path: str) -> str:
    with pytest.raises(ConfigError, match="NaN bit patterns") as caught:
        load_model(path, quantization_config=nf4(bnb_4bit_quant_storage="bfloat16"))
    return str(caught.value)


def test_bf16_storage_under_fsdp2_is_refused_with_the_reason(llama: Path) -> None:
    for message in run_distributed(refuse_storage, str(llama), env=FSDP2):
        assert "Leave bnb_4bit_quant_storage at its default" in message


def refuse_everything_at_once(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(path, quantization_config=nf4(bnb_4bit_quant_storage="bfloat16"), device_map="auto")
    return str(caught.value)


def test_the_rules_of_validate_run_inside_load_model_and_report_together(llama: Path) -> None:
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    env = {**FSDP2, **sizes, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"}
    for message in run_distributed(refuse_everything_at_once, str(llama), env=env):
        for part in ("bnb_4bit_quant_storage", "device_map", "2 replicas of 2 ranks are not 2", "LOCAL_STATE_DICT"):
            assert part in message
        assert message.count("why:") == message.count("fix:") == 4


def refuse_class(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(path, quantization_config=nf4())
    return str(caught.value)


def test_wrap_policy_that_names_no_class_is_refused_before_reading(llama: Path) -> None:
    env = {**FSDP2, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block"}
    assert all("GPT2Block is no class" in message for message in run_distributed(refuse_class, str(llama), env=env))


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


def load_slowly(name: str, cache_dir: str) -> int:
    """A hub model that takes longer to download than the process group waits."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=4))
    stock = loading.find_checkpoint

    def find_checkpoint(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 0 and not waited:
            waited.append(True)
            time.sleep(8)
        return stock(*args, **kwargs)

    waited: list[bool] = []
    loading.find_checkpoint = find_checkpoint
    model = load_model(name, quantization_config=nf4(), cache_dir=cache_dir, local_files_only=True)
    return len(waited) + model.load_report.quantized_layers


def test_ranks_wait_for_a_download_longer_than_their_time_out(llama: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--someone--tiny"
    shutil.copytree(llama, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    counts = run_distributed(load_slowly, "someone/tiny", str(tmp_path), env=FSDP2, process_group=False)
    assert counts == [15, 14]  # layers, and one wait on the rank that downloads


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


def test_rows_are_gathered_twice_a_step_with_checkpointing_and_nothing_else_with_them(llama: Path) -> None:
    for gathers, one_layer in run_distributed(count_gathers, str(llama), env=FSDP2):
        assert gathers == [one_layer] * 4  # two layers, once forward, once backward
