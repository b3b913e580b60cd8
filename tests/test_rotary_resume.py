"""Checkpoints of rotary training through the stock SFTTrainer: resumed runs are the uninterrupted ones, a killed save
costs nothing but itself, and evaluation sees the weights that are saved.

References: the uninterrupted run, bit for bit on the same number of ranks; stock transformers on the exported model.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer
from trl import SFTTrainer

from hf_fsdp_qlora.safetensors_stream import SafetensorsWriter
from tests.rotary_story import make_rotary_trainer, sft_config, train_rotary
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import make_tokenizer
from tests.trainer_story import launch, make_data

BF16 = torch.bfloat16
# Steps 0-2 are visit 0, 3-5 visit 1, 6-8 visit 2: checkpoints 2, 4 and 8 are in the middle of a visit.
RUN: dict[str, Any] = dict(max_steps=9, save_strategy="steps", save_steps=2)
VISITS = {"active": 1, "steps_per_block": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "int8-reset": {"rotary": {"frozen": "int8"}},
    "nf4-keep-warmup": {"rotary": {"frozen": "nf4", "moments": "keep", "warmup_steps": 1}},
    "bf16-masters-keep-8bit": {
        "rotary": {"frozen": "int8", "master_dtype": "bfloat16", "moments": "keep", "keep_bits": 8}, "dtype": BF16
    },
    "importance-halves": {
        "rotary": {
            "frozen": "bf16", "order": "importance", "split": "attention_mlp", "always_active": ["norm", "head"]
        },
        "dtype": BF16,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), dtype=BF16))


def run(name: str, engine: str, model_path: str, folder: Path, **kwargs: Any) -> list[dict[str, Any]]:
    settings = {**RUN, **VARIANTS[name], **kwargs}
    settings["rotary"] = {**VISITS, **VARIANTS[name]["rotary"]}
    return launch(engine, train_rotary, model_path, str(folder), **settings)


def assert_same_run(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("losses", "grad_norms", "learning_rates"):
        assert actual[key] == expected[key], key
    assert update_norms(actual["logs"]) == update_norms(expected["logs"])
    assert actual["weights"].keys() == expected["weights"].keys()
    assert all(torch.equal(actual["weights"][name], value) for name, value in expected["weights"].items())


def update_norms(logs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Those of every step, in a resumed run with the steps before."""
    entries = [entry for entry in logs if "loss" in entry]
    return [{key: value for key, value in entry.items() if "update_norm" in key} for entry in entries]


@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_inside_a_visit_equals_the_uninterrupted_run(name: str, model_path: str, tmp_path: Path) -> None:
    [whole] = run(name, "one-process", model_path, tmp_path / "whole")
    for step in (2, 4, 8) if name == "int8-reset" else (4,):
        resume = str(tmp_path / "whole" / f"checkpoint-{step}")
        [resumed] = run(name, "one-process", model_path, tmp_path / f"from-{step}", resume=resume)
        assert_same_run(resumed, whole)
    assert len(set(whole["losses"])) == 9


def test_two_ranks_resume_bit_for_bit_and_others_go_on(model_path: str, tmp_path: Path) -> None:
    [whole, other] = run("nf4-keep-warmup", "ddp", model_path, tmp_path / "whole")
    assert_same_run(other, whole)
    resume = str(tmp_path / "whole" / "checkpoint-4")
    for engine in ("ddp", "fsdp2-full", "one-process"):
        for resumed in run("nf4-keep-warmup", engine, model_path, tmp_path / engine, resume=resume):
            if engine == "ddp":
                assert_same_run(resumed, whole)
            # Sums over ranks in another order, in float32; quantisation can turn that into one code more or less.
            assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    one = str(tmp_path / "one-process" / "checkpoint-8")
    for resumed in run("nf4-keep-warmup", "fsdp2-full", model_path, tmp_path / "back", resume=one):
        assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-4)


@pytest.mark.parametrize("when", ["masters", "trainer"])
def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(
    when: str, model_path: str, tmp_path: Path
) -> None:
    [whole] = run("int8-reset", "one-process", model_path, tmp_path / "whole", save_total_limit=1)
    assert [path.name for path in (tmp_path / "whole").glob("checkpoint-*")] == ["checkpoint-9"]
    settings = {**RUN, "rotary": {**VISITS, "frozen": "int8"}, "save_total_limit": 1}
    with pytest.raises(AssertionError, match=f"exit code -{signal.SIGKILL.value}"):
        launch("one-process", _train_until_killed, model_path, str(tmp_path / "killed"), when, settings)
    left = sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-4"]
    [resumed] = run("int8-reset", "one-process", model_path, tmp_path / "killed", resume=True, save_total_limit=1)
    assert_same_run(resumed, whole)
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-9"]


def _train_until_killed(model_path: str, output_dir: str, when: str, settings: dict[str, Any]) -> None:
    """Die in the save of step 4: among the masters, or later, when they are all there."""
    saving: list[str] = []
    append = SafetensorsWriter.append

    def save_checkpoint(trainer: Trainer, *args: Any) -> None:
        if trainer.state.global_step == 4:
            saving.append(when)
        original(trainer, *args)

    def append_or_die(writer: SafetensorsWriter, tensor: torch.Tensor) -> None:
        append(writer, tensor)
        if saving == ["masters"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_rng_or_die(trainer: Trainer, output_dir: str) -> None:
        if saving == ["trainer"]:
            assert (Path(output_dir) / "rotary" / "state.json").exists()
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsWriter, "append", append_or_die)
        patch.setattr(Trainer, "_save_rng_state", save_rng_or_die)
        trainer, _ = make_rotary_trainer(model_path, output_dir, **settings)
        original = Trainer._save_checkpoint  # as load_model replaced it
        patch.setattr(Trainer, "_save_checkpoint", save_checkpoint)
        trainer.train()


@pytest.mark.parametrize("engine", ["one-process", "ddp", "fsdp2-full"])
def test_evaluation_on_the_masters_is_that_of_the_exported_model(engine: str, model_path: str, tmp_path: Path) -> None:
    ranks = launch(engine, _evaluate_twice, model_path, str(tmp_path))
    [exported] = launch("one-process", _evaluate_stock, str(tmp_path / "final"), str(tmp_path / "stock"))
    for metrics in ranks:
        # float32 weights on both sides; two ranks add up losses in another order and pad batches differently
        assert metrics["eval_masters_loss"] == pytest.approx(exported, rel=1e-6 if engine == "one-process" else 1e-2)
        assert abs(metrics["eval_loss"] - exported) > 0.003, "quantising changed nothing, so nothing was tested"
        assert metrics["eval_masters_loss"] == metrics["logged"]
        assert metrics["again"] == metrics["eval_loss"], "the first evaluation was changed by the second"


def _evaluate_twice(model_path: str, output_dir: str) -> dict[str, float]:
    settings = {**VISITS, "frozen": "nf4", "eval_masters": True}
    trainer, _ = make_rotary_trainer(
        model_path, output_dir, rotary=settings, max_steps=4, eval_strategy="steps", eval_steps=4, learning_rate=0.1
    )
    trainer.train()
    metrics = trainer.evaluate()
    again = trainer.evaluate()["eval_loss"]
    of_two = trainer.evaluate({"one": make_data(8, seed=1), "two": make_data(4, seed=2)})
    assert of_two["eval_one_loss"] == again and of_two["eval_one_masters_loss"] == metrics["eval_masters_loss"]
    assert len([key for key in of_two if key.endswith("_loss")]) == 4
    trainer.save_model(str(Path(output_dir) / "final"))
    logged = [entry["eval_masters_loss"] for entry in trainer.state.log_history if "eval_masters_loss" in entry]
    return {**metrics, "logged": logged[-1], "again": again}


def _evaluate_stock(folder: str, output_dir: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = SFTTrainer(
        model=model, args=sft_config(output_dir, model), train_dataset=make_data(2),
        eval_dataset=make_data(8, seed=1), processing_class=make_tokenizer(),
    )  # fmt: skip
    return trainer.evaluate()["eval_loss"]


def test_evaluation_in_the_middle_of_a_run_leaves_the_run_alone(model_path: str, tmp_path: Path) -> None:
    [plain] = run("int8-reset", "one-process", model_path, tmp_path / "plain", save_strategy="no")
    settings = {**VISITS, **VARIANTS["int8-reset"]["rotary"], "eval_masters": True}
    [evaluated] = launch(
        "one-process", train_rotary, model_path, str(tmp_path / "evaluated"), rotary=settings, max_steps=9,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    assert_same_run(evaluated, plain)
    assert len([entry for entry in evaluated["logs"] if "eval_masters_loss" in entry]) == 9


def test_a_checkpoint_that_was_cut_short_is_passed_over_and_not_others(tmp_path: Path) -> None:
    import transformers.trainer

    from hf_fsdp_qlora.trainer_compat import install

    install()
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-best").mkdir()
    last = transformers.trainer.get_last_checkpoint
    (tmp_path / "checkpoint-11").mkdir()  # what no Trainer can resume
    assert last(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"global_step"')  # nobody's mark: upstream's rule
    assert last(str(tmp_path)) == str(tmp_path / "checkpoint-11")
    (tmp_path / "checkpoint-11" / ".saving").touch()
    assert last(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"global_step": 11}')  # killed just before the end
    assert last(str(tmp_path)) == str(tmp_path / "checkpoint-11")
    assert last(str(tmp_path / "checkpoint-best")) is None


@pytest.mark.parametrize("frozen", ["int8", "bf16"])
def test_a_checkpoint_in_a_visit_does_not_shorten_its_update_norms(
    model_path: str, tmp_path: Path, frozen: str
) -> None:
    """A save writes the masters that the norm is measured against; over two sweeps of two visits, saved at each step.
    Blocks of the first are compared with the file, of the second with what was put aside."""
    logs = []
    for save_strategy in ("no", "steps"):
        trainer, rotary = make_rotary_trainer(
            model_path, str(tmp_path), max_steps=9, save_strategy=save_strategy, save_steps=1, learning_rate=1e-2,
            dtype=BF16, rotary={"active": 2, "steps_per_block": 2, "frozen": frozen},
        )  # fmt: skip
        trainer.train()
        assert not list(rotary.masters.starts())
        logs.append(trainer.state.log_history)
    norms = [update_norms(run_logs) for run_logs in logs]
    assert norms[0] == norms[1]
    seen = [key for entry in norms[0] for key in entry]
    assert len(seen) > len(set(seen)) > 3, "some block was parked twice"
