"""What the parts of rotary training promise each other: where backward stops, whose numbers a step uses, what is sent
between ranks, what rows are made of, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTTrainer

from hf_fsdp_qlora.callbacks import WeightIntegrityCallback
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.rotary import gradients, optimizer
from hf_fsdp_qlora.rotary.masters import gather_whole
from hf_fsdp_qlora.rotary.optimizer import RotaryOptimizer
from hf_fsdp_qlora.sharding import shard_again
from tests.distributed import run_distributed
from tests.rotary_story import losses, make_rotary_trainer, sft_config, train_rotary, train_stock
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import make_tokenizer
from tests.trainer_story import launch, launch_env, make_data

LAYERS, LINEARS, MICRO_BATCHES = 4, 7, 2
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    return str(save_tiny_model(path, dtype=BF16, num_hidden_layers=LAYERS))


class Watch(TrainerCallback):
    """Calls a function before every optimizer step; `values` is what it returned."""

    def __init__(self, look: Any) -> None:
        self.look = look
        self.values: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.values.append(self.look())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_nothing_below_the_lowest_active_block_is_back_propagated(
    model_path: str, tmp_path: Path, checkpointing: bool
) -> None:
    """From the head down: with layer i active, gradients reach the outputs of the parked linears of the layers above
    it, and of no others."""
    reached: list[int] = []
    watch = Watch(lambda: len(reached))
    trainer, prepared = make_rotary_trainer(
        model_path, str(tmp_path), callbacks=[watch], max_steps=6, gradient_checkpointing=checkpointing,
        rotary={"active": 1, "steps_per_block": 1, "order": "reverse", "frozen": "int8"},
    )  # fmt: skip

    def watch_output(layer: QuantizedLinear, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad and layer.dense is not None and not layer.dense.numel():
            output.register_hook(lambda gradient: reached.append(1))

    for layer in _quantized(prepared).values():
        layer.register_forward_hook(watch_output)
    trainer.train()
    per_step = [after - before for before, after in zip([0, *watch.values], watch.values, strict=False)]
    above = [0, 0, 1, 2, 3, 4]  # head, layers 3, 2, 1, 0, embedding
    assert per_step == [LINEARS * MICRO_BATCHES * layers for layers in above]


class ReferenceMasters(torch.optim.Optimizer):
    """AdamW over float32 copies of 16-bit parameters, written down plainly."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, kwargs)
        self.copies = [[parameter.detach().float() for parameter in group["params"]] for group in self.param_groups]
        groups = [{**group, "params": copies} for group, copies in zip(self.param_groups, self.copies, strict=True)]
        self.adamw = torch.optim.AdamW(groups, **kwargs)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, own, copies in zip(self.param_groups, self.adamw.param_groups, self.copies, strict=True):
            own["lr"] = group["lr"]
            for parameter, copy in zip(group["params"], copies, strict=True):
                copy.grad = parameter.grad.float()
        self.adamw.step()
        for group, copies in zip(self.param_groups, self.copies, strict=True):
            for parameter, copy in zip(group["params"], copies, strict=True):
                parameter.copy_(copy)


def test_bf16_model_with_float32_masters_equals_plain_master_weights(model_path: str, tmp_path: Path) -> None:
    """Stock AdamW on bf16 weights would round every update; the reference is AdamW on float32 copies, bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=BF16)
    choice = (ReferenceMasters, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8})
    trainer = SFTTrainer(
        model=model, args=sft_config(str(tmp_path), model), train_dataset=make_data(32),
        processing_class=make_tokenizer(), optimizer_cls_and_kwargs=choice,
    )  # fmt: skip
    trainer.train()
    run = train_rotary(model_path, str(tmp_path), dtype=BF16, optim="adamw_torch", rotary={"frozen": "int8"})
    assert run["losses"] == losses(trainer)["losses"]
    for name, parameter in model.named_parameters():
        assert torch.equal(run["weights"][name].to(BF16), parameter), name
    assert any(not torch.equal(weight, weight.to(BF16).float()) for weight in run["weights"].values())


def test_stepping_in_pieces_changes_nothing(model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 24,864 and 21,504 weights in pieces of up to 4,096, and moments kept over visits."""
    run: dict[str, Any] = dict(
        dtype=BF16, max_steps=14, rotary={"active": 3, "steps_per_block": 2, "frozen": "int8", "moments": "keep"}
    )
    expected = train_rotary(model_path, str(tmp_path), **run)
    monkeypatch.setattr(optimizer, "PIECE_ELEMENTS", 4096)
    actual = train_rotary(model_path, str(tmp_path), **run)
    assert actual["losses"] == expected["losses"]
    assert all(torch.equal(actual["weights"][name], weight) for name, weight in expected["weights"].items())


def test_bf16_masters_are_rounded_by_seed_and_keep_small_updates(model_path: str, tmp_path: Path) -> None:
    def run(master_dtype: str, seed: int) -> dict[str, Any]:
        rotary = {"frozen": "int8", "master_dtype": master_dtype, "seed": seed}
        return train_rotary(model_path, str(tmp_path), dtype=BF16, rotary=rotary, learning_rate=2e-6, max_steps=12)

    first, again, other = run("bfloat16", 1), run("bfloat16", 1), run("bfloat16", 2)
    exact = run("float32", 1)
    assert all(torch.equal(first["weights"][name], weight) for name, weight in again["weights"].items())
    assert any(not torch.equal(first["weights"][name], weight) for name, weight in other["weights"].items())
    start = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).state_dict()
    # An element moves by less than half of bfloat16's spacing, so rounding to nearest would lose most of it.
    name = "model.layers.0.mlp.up_proj.weight"
    update = exact["weights"][name] - start[name]
    rounded = first["weights"][name].float() - start[name]
    kept = float((rounded * update).sum() / update.square().sum())
    assert kept == pytest.approx(1, abs=0.1), "the mean of what was rounded is the update"
    nearest = exact["weights"][name].to(BF16).float() - start[name]
    assert float((nearest * update).sum() / update.square().sum()) < 0.5


def test_the_schedule_is_that_of_any_other_run_and_visits_warm_up(model_path: str, tmp_path: Path) -> None:
    """Learning rates as logged by stock training, over three rotations; the factor inside a visit is apart."""
    expected = train_stock(model_path, str(tmp_path), max_steps=9, lr_scheduler_type="cosine")["learning_rates"]
    rotary: dict[str, Any] = {"active": 1, "steps_per_block": 3, "frozen": "int8", "warmup_steps": 1}
    rates: list[tuple[float, float]] = []
    trainer, _ = make_rotary_trainer(
        model_path, str(tmp_path), rotary=rotary, max_steps=9, lr_scheduler_type="cosine",
        callbacks=[Watch(lambda: rates.append((ours().learning_rate_factor, ours().param_groups[0]["lr"])))],
    )  # fmt: skip

    def ours() -> RotaryOptimizer:
        wrapped: Any = trainer.optimizer
        return wrapped.optimizer

    trainer.train()
    assert losses(trainer)["learning_rates"] == expected == [rate for _, rate in rates]
    assert [factor for factor, _ in rates] == [0.5, 1.0, 1.0] * 3


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_moments_are_dropped_or_come_back(model_path: str, tmp_path: Path, moments: str) -> None:
    """Adam's step counters in the last step of a second sweep over six blocks of two steps."""
    counters: list[set[float]] = []
    rotary = {"active": 1, "steps_per_block": 2, "frozen": "int8", "moments": moments}
    trainer, prepared = make_rotary_trainer(
        model_path, str(tmp_path), rotary=rotary, max_steps=24, callbacks=[Watch(lambda: counters.append(look()))]
    )

    def look() -> set[float]:
        states = prepared.callback.all_moments()
        return {float(states[name]["step"]) for name in prepared.active.slices if "step" in states[name]}

    trainer.train()
    norm, own = 23.0, 3.0 if moments == "keep" else 1.0
    assert counters[-1] == {norm, own}, "the final norm is active all the time and never starts again"


@pytest.mark.parametrize("engine", ["one-process", "ddp", "fsdp2-full"])
@pytest.mark.parametrize("frozen", ["int8", "nf4", "bf16"])
def test_rows_of_parked_layers_are_made_from_the_masters(
    model_path: str, tmp_path: Path, engine: str, frozen: str
) -> None:
    """After a sweep over all blocks, under a check of every row after every step."""
    for same, changed in launch(engine, _train_and_compare_rows, model_path, str(tmp_path), frozen):
        assert same == LAYERS * LINEARS
        assert changed == same, "training changed no rows"


def test_rows_are_rewritten_where_fsdp2_keeps_layers_gathered(model_path: str, tmp_path: Path) -> None:
    env = {**launch_env("fsdp2"), "FSDP_RESHARD_AFTER_FORWARD": "false"}
    arguments = (_train_and_compare_rows, model_path, str(tmp_path), "int8")
    for counts in run_distributed(*arguments, env=env, process_group=False):
        assert counts == (LAYERS * LINEARS, LAYERS * LINEARS)


def test_masters_replaced_after_an_evaluation_reach_rows_that_it_left_gathered(
    model_path: str, tmp_path: Path
) -> None:
    """As `load_best_model_at_end` replaces them. FSDP2 would go on with the gathered rows, or lose the new ones."""
    env = {**launch_env("fsdp2"), "FSDP_RESHARD_AFTER_FORWARD": "false"}
    for right in run_distributed(_replace_masters, model_path, str(tmp_path), env=env, process_group=False):
        assert right == LAYERS * LINEARS


def _replace_masters(model_path: str, output_dir: str) -> int:
    trainer, prepared = make_rotary_trainer(model_path, output_dir, rotary={"frozen": "int8"}, max_steps=1)
    trainer.train()
    trainer.evaluate()
    for name, values in list(prepared.masters.trained()):
        prepared.masters.store(name, 2 * values)
    prepared.active.refresh()
    shard_again(prepared.model)
    return _compare_rows(prepared)[0]


def _compare_rows(prepared: Any, before: dict[str, torch.Tensor] | None = None) -> tuple[int, int]:
    """How many layers have the rows of their masters, and how many have others than before. Collective."""
    same = changed = 0
    for name, layer in _quantized(prepared).items():
        master = gather_whole(prepared.masters, f"{name}.weight", dtype=layer.dtype, device=torch.device("cpu"))
        codes, stats = layer.backend.quantize(master.view(-1), master.numel(), lambda rows: rows)
        dequantized = layer.dequantize()
        same += torch.equal(dequantized, layer.backend.dequantize(codes, stats, (*master.shape,)))  # type: ignore[arg-type]
        changed += before is not None and not torch.equal(dequantized, before[name])
    return same, changed


def _quantized(prepared: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in prepared.model.named_modules() if isinstance(module, QuantizedLinear)}


def _train_and_compare_rows(model_path: str, output_dir: str, frozen: str) -> tuple[int, int]:
    rotary = {"active": 2, "steps_per_block": 2, "frozen": frozen}
    trainer, prepared = make_rotary_trainer(
        model_path, output_dir, rotary=rotary, dtype=BF16, max_steps=6, learning_rate=1e-2, eval_strategy="steps",
        eval_steps=1, callbacks=[WeightIntegrityCallback(every_n_steps=1)],
    )  # fmt: skip
    before = {name: layer.dequantize() for name, layer in _quantized(prepared).items()}
    trainer.train()
    return _compare_rows(prepared, before)


def test_gradients_travel_once_per_step(model_path: str, tmp_path: Path) -> None:
    """Two micro-batches: the hooks reduce in the second alone, and only what is active."""
    for calls, parameters in launch("ddp", _count_reductions, model_path, str(tmp_path)):
        assert calls == 3 * parameters


def _count_reductions(model_path: str, output_dir: str) -> tuple[int, int]:
    calls: list[int] = []
    stock = gradients.dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(bool(kwargs.get("async_op")))
        return stock(*args, **kwargs)

    trainer, prepared = make_rotary_trainer(model_path, output_dir, rotary={"active": 2, "steps_per_block": 9},
                                            max_steps=3)  # fmt: skip
    active: list[int] = []
    trainer.add_callback(Watch(lambda: active.append(len(prepared.active.slices))))
    gradients.dist.all_reduce = counted  # type: ignore[assignment]
    trainer.train()
    return sum(calls), active[0]


def test_a_second_run_goes_on_from_the_first(model_path: str, tmp_path: Path) -> None:
    """`train` twice on one trainer: the second begins with everything trainable and the masters of the first."""
    trainer, prepared = make_rotary_trainer(
        model_path, str(tmp_path), rotary={"active": 2, "frozen": "int8"}, learning_rate=1e-2
    )
    trainer.train()
    first = losses(trainer)["losses"]
    assert prepared.masters.private_bytes and not prepared.active.slices
    assert all(owner.parameter.requires_grad for owner in prepared.active.parameters.values())
    trainer.train()
    assert losses(trainer)["losses"][0] < first[0] - 0.01, "the same batch, on weights that were trained"


def test_what_is_logged_is_what_happened(model_path: str, tmp_path: Path) -> None:
    """Three visits of one block each, from the embedding up; the final norm trains all along."""
    rotary = {"active": 1, "steps_per_block": 2, "order": "sequential", "frozen": "int8"}
    run = train_rotary(model_path, str(tmp_path), rotary=rotary, max_steps=6)
    start = load_file(Path(model_path) / "model.safetensors")
    logs = [entry for entry in run["logs"] if "loss" in entry]
    assert [entry["rotary/visit"] for entry in logs] == [0, 1, 1, 2, 2, 3]  # as of the end of the step
    assert [entry["rotary/lowest_active_block"] for entry in logs] == [0, 1, 1, 2, 2, 3]
    name = "model.embed_tokens.weight"
    change = float((run["weights"][name] - start[name].float()).norm())
    assert logs[1]["rotary/update_norm/embedding"] == pytest.approx(change, rel=1e-5)
    assert "rotary/update_norm/layer 0" in logs[3] and "rotary/update_norm/layer 0" not in logs[4]
    sizes = {name: weight.numel() for name, weight in start.items()}
    shares = [sum(n for key, n in sizes.items() if key == name or "layers.0." in key or key == "model.norm.weight")]
    assert logs[1]["rotary/coverage"] == pytest.approx(shares[0] / sum(sizes.values()), abs=1e-4)
    trained = [key for key, weight in run["weights"].items() if not torch.equal(weight, start[key].float())]
    held = 4 * sum(sizes[key] for key in trained) / sum(sizes.values())
    assert logs[-1]["rotary/host_bytes_per_parameter"] <= held


def test_8_bit_optimizer_trains_and_takes_a_quarter_of_the_memory(model_path: str, tmp_path: Path) -> None:
    """bitsandbytes' AdamW in 8 bits beside torch's: losses within 0.1 %; one byte per moment and block scales."""
    run: dict[str, Any] = dict(dtype=BF16, max_steps=12, rotary={"active": 2, "steps_per_block": 3, "frozen": "int8"})
    expected = train_rotary(model_path, str(tmp_path), optim="adamw_torch", **run)
    sizes: list[tuple[int, int]] = []
    trainer, prepared = make_rotary_trainer(
        model_path, str(tmp_path), optim="adamw_8bit", callbacks=[Watch(lambda: sizes.append(look()))], **run
    )

    def look() -> tuple[int, int]:
        wrapped: Any = trainer.optimizer
        return wrapped.optimizer.state_bytes(), sum(s.values.numel() for s in prepared.active.slices.values())

    trainer.train()
    assert losses(trainer)["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert losses(trainer)["losses"] != expected["losses"]
    held, numel = sizes[2]  # the last step of the first visit
    assert 2 * numel < held < 2.6 * numel, "small tensors are kept in 32 bits, and code books are 2 KiB a tensor"


@pytest.mark.parametrize("optim", [name for name in optimizer.SUPPORTED if not name.startswith("adamw")])
def test_other_optimizers_step_in_pieces_and_keep_their_states(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    """The same run with pieces of 8,192 weights, over two sweeps: states are cut and joined where they should be."""
    rotary = {"active": 3, "steps_per_block": 1, "frozen": "int8", "moments": "keep"}
    run: dict[str, Any] = dict(dtype=BF16, optim=optim, max_steps=6, learning_rate=1e-4, rotary=rotary)
    expected = train_rotary(model_path, str(tmp_path), **run)
    monkeypatch.setattr(optimizer, "PIECE_ELEMENTS", 8192)
    actual = train_rotary(model_path, str(tmp_path), **run)
    assert actual["losses"] == expected["losses"]
    assert all(torch.equal(actual["weights"][name], weight) for name, weight in expected["weights"].items())
