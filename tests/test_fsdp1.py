"""FSDP1: the same numbers as one process and as FSDP2, on ranks that hold parts of flat parameters.

accelerate cannot set FSDP1 up on CPU by itself; most tests wrap with `fsdp1.wrap`, which takes the arguments that
accelerate is given. The last ones go through accelerate and the stock SFTTrainer all the same: what `load_model`
attached tells accelerate that it is FSDP. References: one process without FSDP, and FSDP2.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp._flat_param import FlatParamHandle

from hf_fsdp_qlora import fsdp1
from hf_fsdp_qlora.callbacks import WeightIntegrityCallback
from hf_fsdp_qlora.export import gather_adapter
from hf_fsdp_qlora.integrity import IntegrityError, check_integrity
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.loading import load_model
from hf_fsdp_qlora.lora import QuantizedLoraLinear
from hf_fsdp_qlora.skeleton import decoder_layers
from hf_fsdp_qlora.trainer_compat import attachment
from tests.conformance.cases import CASES
from tests.distributed import run_distributed
from tests.loading_story import CPU, FSDP2, LORA, batch, nf4, plain_name
from tests.tiny_models import save_tiny_model
from tests.trainer_story import fsdp1_env, launch_env, make_trainer, model_of, report

FSDP1 = {**CPU, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
WAYS = {"flat": False, "orig": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama", shard_size="100KB")


def wrap(model: Any, use_orig_params: bool) -> Any:
    attached = attachment(model)
    assert attached is not None and attached.engine == "fsdp1"
    arguments = fsdp1.unit_arguments(
        model, decoder_layers(model.get_base_model()), precision=attached.precision, offload=attached.offload,
        device=torch.device("cpu"),
    )  # fmt: skip
    return fsdp1.wrap(model, arguments, use_orig_params=use_orig_params)


def train_step(path: str, engine: str, fuse: bool = True, **kwargs: Any) -> dict[str, Any]:
    """Loss and adapter after one SGD step of size one: the difference to the start is the gradient.

    Args:
        fuse: let the base's product add the adapter where it can, which it cannot in units of FSDP1.
    """
    QuantizedLoraLinear.fuse = fuse
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian", lora_dropout=0.0)
    model: Any = load_model(path, quantization_config=nf4(), peft_config=lora, **kwargs)
    inner = model
    early = {n: m.dequantize().clone() for n, m in inner.named_modules() if isinstance(m, QuantizedLinear)}
    if engine in WAYS:
        model = wrap(model, WAYS[engine])
    start = {name: value.clone() for name, value in gather_adapter(inner).items()}
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    inner.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(2):  # lora_B is zero at first, which hides the gradient of lora_A
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    rows = check_integrity(model)
    late = {fsdp1.clean_name(n): m.dequantize() for n, m in inner.named_modules() if isinstance(m, QuantizedLinear)}
    assert early.keys() == late.keys() and all(torch.equal(late[name], early[name]) for name in early)
    buffers = {fsdp1.clean_name(n): b.dtype for n, b in model.named_buffers() if "inv_freq" in n}
    return {
        "losses": losses, "start": start, "end": gather_adapter(inner), "rows": rows, "buffers": buffers,
        "weights": {plain_name(name): weight for name, weight in late.items()},
    }  # fmt: skip


def run(path: Path, engine: str, **kwargs: Any) -> list[dict[str, Any]]:
    if engine == "one process":
        return run_distributed(train_step, str(path), engine, world_size=1, process_group=False, env=CPU, **kwargs)
    env = FSDP2 if engine == "fsdp2" else FSDP1
    return run_distributed(train_step, str(path), engine, env=env, **kwargs)


@pytest.mark.parametrize("engine", [*WAYS, "fsdp2"])
def test_two_ranks_equal_one_process_in_fp32(llama: Path, engine: str) -> None:
    fuse = engine == "fsdp2"
    [expected] = run(llama, "one process", precision="fp32", fuse=fuse)
    results = run(llama, engine, precision="fp32", fuse=fuse)
    for result in results:
        # Both ranks see the same batch, so that sums and means are exact: equal, not close.
        assert result["losses"] == expected["losses"] and result["rows"] == expected["rows"] > 0
        assert all(torch.equal(result["weights"][name], weight) for name, weight in expected["weights"].items())
    for when in ("start", "end"):
        assert results[0][when].keys() == expected[when].keys()
        for name, value in expected[when].items():
            assert torch.equal(results[0][when][name], value), (when, name)


@pytest.mark.parametrize("engine", WAYS)
def test_bf16_losses_equal_fsdp2_to_rounding(llama: Path, engine: str) -> None:
    [expected, _], results = run(llama, "fsdp2"), run(llama, engine)
    for result in results:
        # bfloat16 has 8 bits; FSDP1 sums the adapters' gradients in float32 as FSDP2 does.
        assert result["losses"] == pytest.approx(expected["losses"], rel=2e-3)
        assert set(result["buffers"].values()) == {torch.float32}
        assert all(torch.equal(result["weights"][name], weight) for name, weight in expected["weights"].items())


def survive(
    path: str, names: list[str], broadcast_by_torch: bool, use_orig_params: bool = True
) -> dict[str, dict[str, Tensor]]:
    """Every format's weights after wrapping and a step."""
    found = {}
    for name in names:
        model: Any = load_model(path, quantization_config=CASES[name].make_config(), peft_config=LORA)
        wrapped = wrap_as_on_gpu(model) if broadcast_by_torch else wrap(model, use_orig_params)
        wrapped.train()
        wrapped(**batch()).loss.backward()
        assert check_integrity(wrapped) > 0
        layers = [(fsdp1.clean_name(n), m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
        found[name] = {plain_name(key): layer.dequantize() for key, layer in layers}
    return found


def wrap_as_on_gpu(model: Any) -> Any:
    """Let torch broadcast while it wraps, as accelerate asks it to on a GPU; it refuses on CPU, where gloo could."""
    fsdp1._broadcast = lambda *_: None  # type: ignore[assignment]
    torch.distributed.fsdp._init_utils._check_module_states_for_sync_module_states = lambda *_: None
    attached, layers = attachment(model), decoder_layers(model.get_base_model())
    assert attached is not None
    arguments = fsdp1.unit_arguments(
        model, layers, precision=attached.precision, offload="none", device=torch.device("cpu")
    )
    return fsdp1.wrap(model, {**arguments, "sync_module_states": True})


def weights_of(path: str, names: list[str]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in names:
        model = load_model(path, quantization_config=CASES[name].make_config(), peft_config=LORA)
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
        found[name] = {plain_name(key): layer.dequantize() for key, layer in layers}
    return found


@pytest.mark.parametrize(("ranks", "broadcast_by_torch"), [(3, False), (2, True)], ids=["3 ranks", "torch broadcasts"])
def test_every_format_survives(tmp_path: Path, ranks: int, broadcast_by_torch: bool) -> None:
    llama = save_tiny_model(tmp_path, "qwen2" if broadcast_by_torch else "llama")  # tied and not
    names = list(CASES) if ranks == 3 else list(CASES)[:1]
    [expected] = run_distributed(weights_of, str(llama), names, world_size=1, process_group=False, env=CPU)
    for found in run_distributed(survive, str(llama), names, broadcast_by_torch, world_size=ranks, env=FSDP1):
        for name in names:
            assert found[name].keys() == expected[name].keys()
            assert all(torch.equal(found[name][key], weight) for key, weight in expected[name].items()), name


@pytest.mark.parametrize("use_orig_params", WAYS.values(), ids=WAYS)
def test_rows_behind_an_odd_number_of_16_bit_values_are_read(tmp_path: Path, use_orig_params: bool) -> None:
    odd = str(save_tiny_model(tmp_path, "llama", mlp_bias=True, intermediate_size=225))
    names = ["nf4", "nf4 nested"]
    [expected] = run_distributed(weights_of, odd, names, world_size=1, process_group=False, env=CPU)
    for found in run_distributed(survive, odd, names, False, use_orig_params, env=FSDP1):
        for name in names:
            assert all(torch.equal(found[name][key], weight) for key, weight in expected[name].items()), name


def damage(path: str) -> str:
    model = wrap(load_model(path, quantization_config=nf4(), peft_config=LORA), use_orig_params=False)
    check_integrity(model)
    unit = next(unit for unit in type(model).fsdp_modules(model) if "DecoderLayer" in type(unit.module).__name__)
    if torch.distributed.get_rank() == 0:
        unit._handle.flat_param.data.view(torch.uint8)[100] ^= 1
    with pytest.raises(IntegrityError, match="1 of") as caught:
        check_integrity(model)
    return str(caught.value)


def test_one_changed_bit_is_found_on_every_rank_after_wrapping(llama: Path) -> None:
    assert all("_proj" in message for message in run_distributed(damage, str(llama), env=FSDP1))


def continue_and_save(path: str, saved: str, output_dir: str) -> None:
    """Load a saved adapter, wrap, save it again, and see that no frozen unit was gathered for it."""
    model: Any = load_model(path, quantization_config=nf4(), adapter_name_or_path=saved)
    root = wrap(model, use_orig_params=False)
    gathered: list[bool] = []
    unshard = FlatParamHandle.unshard

    def watched(handle: Any) -> None:
        gathered.append(handle.flat_param.requires_grad)
        unshard(handle)

    FlatParamHandle.unshard = watched  # type: ignore[method-assign]
    model.save_pretrained(output_dir)
    assert gathered and all(gathered) and fsdp1.is_wrapped(root)


def test_saved_adapter_is_continued_and_saving_gathers_nothing_frozen(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama, quantization_config=nf4(), peft_config=LORA, seed=7)
    model.save_pretrained(str(tmp_path / "one"))
    run_distributed(continue_and_save, str(llama), str(tmp_path / "one"), str(tmp_path / "two"), env=FSDP1)
    first, second = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def story(model_path: str, output_dir: str, lora: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    """Evaluate, train with checkpoints, save, generate: through the stock SFTTrainer and accelerate."""
    trainer = make_trainer(model_path, output_dir, lora=lora, callbacks=[WeightIntegrityCallback()])
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(Path(output_dir) / "final"))
    prompt = torch.arange(3, 10)[None]
    count = 2 + 3 * trainer.args.process_index
    tokens = model_of(trainer).generate(input_ids=prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    wrapped = type(trainer.model_wrapped).__name__
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    init = type(getattr(plugin, "param_init_fn", None)).__name__
    return {**report(trainer), "evaluated": evaluated, "tokens": tokens.tolist()[0], "wrapped": wrapped, "init": init}


LORAS: dict[str, dict[str, Any]] = {
    "lora": {},
    "saved": {"modules_to_save": ["embed_tokens", "input_layernorm"], "lora_bias": True},
}
RUNS = {
    "one": (1, launch_env("plain")), "fsdp2": (2, launch_env("fsdp2")),
    "flat": (2, fsdp1_env(False)), "orig": (2, fsdp1_env(True)),
}  # fmt: skip


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.float32))


def launch(name: str, *args: Any) -> list[dict[str, Any]]:
    world_size, env = RUNS[name]
    return run_distributed(story, *args, world_size=world_size, env=env, process_group=False, timeout_s=90)


@pytest.fixture(scope="module")
def finished(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Finished runs by engine and kind of adapter, made when they are asked for."""

    @functools.cache
    def finish(name: str, lora: str) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(f"{name}-{lora}")
        return folder, launch(name, model_path, str(folder), LORAS[lora])

    return finish


def adapter(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        # Adam normalises gradients, so rounding in tiny ones shows as a small part of a step of 1e-2.
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=3e-5, msg=key)


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("name", WAYS)
def test_stock_trainer_gives_the_run_of_one_process(name: str, lora: str, finished: Any) -> None:
    reference, [expected] = finished("one", lora)
    folder, ranks = finished(name, lora)
    for result in ranks:
        # The order of float32 sums differs: ranks see other parts of the batch.
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-4)
        assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-2)  # batches are padded differently
        assert result["tokens"][:9] == expected["tokens"]
        assert result["dtypes"] == {"torch.float32"} and result["wrapped"] == "FullyShardedDataParallel"
        assert result["init"] == "_ParameterInit", "accelerate's own keeps the weights it made"
    for saved in ("checkpoint-2", "checkpoint-4", "final"):
        assert_close(adapter(folder / saved), adapter(reference / saved))
        assert not list((folder / saved).glob("pytorch_model_fsdp*"))


@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "lora"),
    [
        ("flat", "flat", "lora"), ("orig", "flat", "saved"), ("flat", "orig", "saved"), ("flat", "fsdp2", "lora"),
        ("fsdp2", "orig", "lora"), ("flat", "one", "saved"), ("one", "flat", "lora"),
    ],
)  # fmt: skip
def test_resuming_equals_the_uninterrupted_run(
    saved_by: str, resumed_by: str, lora: str, finished: Any, model_path: str, tmp_path: Path
) -> None:
    folder, ranks = finished(saved_by, lora)
    for result in launch(resumed_by, model_path, str(tmp_path), LORAS[lora], str(folder / "checkpoint-2")):
        assert result["losses"] == pytest.approx(ranks[0]["losses"], rel=1e-5)
    assert_close(adapter(tmp_path / "final"), adapter(folder / "final"))
