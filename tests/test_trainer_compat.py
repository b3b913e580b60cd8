"""Stock SFTTrainer with models that `load_model` sharded: every story here is one that stock code gets wrong.

References: one process without FSDP, and the same run uninterrupted. Losses of two ranks and of one differ only by the
order of float32 sums (1e-5 relative is an order of magnitude above what is seen); resuming on the same number of ranks
is bitwise.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.trainer_compat import Attachment
from hf_fsdp_qlora.trainer_compat.unfinished import patched_save_checkpoint
from tests.distributed import run_distributed
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import make_tokenizer
from tests.trainer_story import (
    RUNS,
    adapter,
    assert_close,
    assert_equal,
    launch,
    make_data,
    make_trainer,
    model_of,
    report,
    train,
)

Finished = dict[str, tuple[Path, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.float32))


@pytest.fixture(scope="module")
def finished(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """For every engine: the output folder of one uninterrupted run, and what its ranks reported."""
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    return {name: (folder, launch(name, _full_story, model_path, str(folder))) for name, folder in folders.items()}


def _full_story(model_path: str, output_dir: str) -> dict[str, Any]:
    trainer = make_trainer(model_path, output_dir, eval_strategy="steps", eval_steps=2)
    prompt = torch.arange(3, 10)[None]
    before = model_of(trainer).generate(input_ids=prompt, max_new_tokens=3, do_sample=False).tolist()
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model(str(Path(output_dir) / "final"))
    forwards: list[int] = []
    model_of(trainer).get_base_model().lm_head.register_forward_hook(lambda *_: forwards.append(1))
    count = 2 + 3 * trainer.args.process_index
    after = model_of(trainer).generate(input_ids=prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return {
        **report(trainer), "before": before, "evaluated": evaluated, "after": after.tolist(),
        "forwards": len(forwards), "wrapped": type(trainer.model_wrapped).__name__,
    }  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_trainer_gives_the_same_run_on_every_engine(name: str, finished: Finished) -> None:
    _, [expected] = finished["one-process"]
    folder, ranks = finished[name]
    for result in ranks:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-4)
        assert result["before"] == expected["before"]
        assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-2)  # batches are padded differently
        assert result["dtypes"] == {"torch.float32"}, "TRL or accelerate cast the adapters"
        assert (result["wrapped"] == "DistributedDataParallel") == (name == "ddp")
        # A rank that is done goes on for the others, which would wait for its shards.
        assert result["forwards"] == (ranks[-1] if name.startswith("fsdp2") else result)["forwards"]
        assert result["after"][0][:9] == expected["after"][0]
    assert max(expected["grad_norms"]) > 0.1, "clipping never happened, so it was not tested"
    assert_close(adapter(folder / "final"), adapter(finished["one-process"][0] / "final"))


@pytest.mark.parametrize("name", RUNS)
def test_every_checkpoint_is_a_standard_peft_directory(
    name: str, finished: Finished, model_path: str, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_path)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(tmp_path))
    expected = {key: tensor.shape for key, tensor in adapter(tmp_path).items()}
    for directory in ("checkpoint-2", "checkpoint-4", "final"):
        saved = finished[name][0] / directory
        assert {key: tensor.shape for key, tensor in adapter(saved).items()} == expected
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), str(saved))
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
        assert torch.equal(loaded.get_parameter(f"{key}.default.weight"), adapter(saved)[f"{key}.weight"])
        assert adapter(saved)[f"{key}.weight"].any()
        assert not list(saved.glob("pytorch_model_fsdp*")) and not list(saved.glob(".saving-*"))


def test_saving_survives_a_rotation_that_takes_the_new_checkpoint(tmp_path: Path) -> None:
    """Beside a checkpoint with a higher number, of a run before, on a file system without times of change."""
    folder = tmp_path / "checkpoint-3"
    model: Any = torch.nn.Linear(1, 1)
    model.hf_fsdp_qlora_attachment = Attachment("none")
    trainer: Any = SimpleNamespace(
        model=model, state=SimpleNamespace(global_step=3), args=SimpleNamespace(should_save=True),
        _get_output_dir=lambda trial: str(tmp_path),
    )  # fmt: skip
    marked: list[str] = []

    def rotate(*_: Any) -> None:
        marked.extend(path.name for path in folder.iterdir())
        shutil.rmtree(folder)

    patched_save_checkpoint(rotate)(trainer, None, None)
    assert marked == [".saving"]
    patched_save_checkpoint(lambda *_: None)(trainer, None, None)
    assert not list(folder.iterdir()), "the mark is left"


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [
        ("fsdp2-full", "fsdp2-full"),
        ("fsdp2-sharded", "fsdp2-sharded"),
        ("fsdp2-full", "fsdp2-one-rank"),
        ("fsdp2-sharded", "fsdp2-one-rank"),
        ("fsdp2-one-rank", "fsdp2-sharded"),
        ("fsdp2-full", "one-process"),
        ("fsdp2-sharded", "ddp"),
        ("ddp", "fsdp2-sharded"),
    ],
)
def test_resuming_equals_the_uninterrupted_run(
    saved_by: str, resumed_by: str, finished: Finished, model_path: str, tmp_path: Path
) -> None:
    folder, ranks = finished[saved_by]
    resumed = launch(resumed_by, train, model_path, str(tmp_path), resume=str(folder / "checkpoint-2"))
    for result in resumed:
        assert result["losses"][:2] == ranks[0]["losses"][:2]  # read back from the checkpoint
        assert result["losses"][2:] == pytest.approx(ranks[0]["losses"][2:], rel=1e-5)
    if saved_by == resumed_by:
        assert_equal(adapter(tmp_path / "final"), adapter(folder / "final"))
    else:
        assert_close(adapter(tmp_path / "final"), adapter(folder / "final"))


def test_frozen_adapter_evaluates_and_is_saved_unchanged(finished: Finished, model_path: str, tmp_path: Path) -> None:
    saved = finished["fsdp2-full"][0] / "checkpoint-4"
    history = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    expected = [entry["eval_loss"] for entry in history if entry["step"] == 4 and "eval_loss" in entry]
    load = {"peft_config": None, "adapter_name_or_path": str(saved), "is_trainable": False}
    losses = launch("fsdp2-full", _evaluate_and_save, model_path, str(tmp_path), load)
    assert losses == expected * 2
    assert_equal(adapter(tmp_path), adapter(saved))


def _evaluate_and_save(model_path: str, output_dir: str, load: dict[str, Any]) -> float:
    trainer = make_trainer(model_path, output_dir, load=load)
    assert not any(parameter.requires_grad for parameter in model_of(trainer).parameters())
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return loss


@pytest.mark.parametrize("name", ["fsdp2-full", "fsdp2-sharded", "ddp"])
def test_load_best_model_at_end_restores_the_best_checkpoint(name: str, model_path: str, tmp_path: Path) -> None:
    ranks = launch(name, _best_story, model_path, str(tmp_path))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = tmp_path / f"checkpoint-{min(losses, key=losses.__getitem__)}"
    assert best.name != "checkpoint-4", "the last checkpoint is the best one, so nothing was tested"
    assert {result["best"] for result in ranks} == {str(best)}
    assert_equal(adapter(tmp_path / "final"), adapter(best))
    # save_total_limit keeps the best one and the last one.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == sorted({best.name, "checkpoint-4"})


def _best_story(model_path: str, output_dir: str) -> dict[str, Any]:
    return train(
        model_path, output_dir, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        save_total_limit=2, learning_rate=0.5, lr_scheduler_type="constant", lora={"modules_to_save": ["lm_head"]},
    )  # fmt: skip


def test_lora_rank_below_the_number_of_shards_trains_and_resumes(tmp_path: Path) -> None:
    """225 columns and one row cannot be split by two on either side: rank 1 holds nothing of these matrices."""
    path = str(save_tiny_model(tmp_path / "model", dtype=torch.float32, intermediate_size=225))
    [expected] = launch("one-process", train, path, str(tmp_path / "one"), lora={"r": 1})
    [sharded, _] = launch("fsdp2-full", train, path, str(tmp_path / "two"), lora={"r": 1})
    assert sharded["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert_close(adapter(tmp_path / "two" / "final"), adapter(tmp_path / "one" / "final"))
    resume = str(tmp_path / "two" / "checkpoint-2")
    [again, _] = launch("fsdp2-full", train, path, str(tmp_path / "again"), lora={"r": 1}, resume=resume)
    assert again["losses"] == sharded["losses"]


def test_head_trains_after_an_evaluation_and_a_generation(model_path: str, tmp_path: Path) -> None:
    """Both leave the head gathered, and the optimizer is made then, and saved after the next evaluation."""
    [expected] = launch("one-process", _early_story, model_path, str(tmp_path / "one"))
    for result in launch("fsdp2-full", _early_story, model_path, str(tmp_path / "two")):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    trained = adapter(tmp_path / "two" / "checkpoint-2")
    for key, value in adapter(tmp_path / "one" / "checkpoint-2").items():
        # Adam makes a step of full size of any gradient, so rounding shows where the head's are next to nothing.
        assert (trained[key] - value).norm() <= 1e-3 * value.norm(), key


def _early_story(model_path: str, output_dir: str) -> dict[str, Any]:
    evaluations: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}  # at 2, a checkpoint follows
    trainer = make_trainer(model_path, output_dir, lora={"modules_to_save": ["lm_head"]}, max_steps=3, **evaluations)
    model_of(trainer).generate(input_ids=torch.arange(3, 10)[None], max_new_tokens=2, do_sample=False)
    trainer.evaluate()
    trainer.train()
    return report(trainer)


def test_epoch_checkpoints_in_bf16_keep_float32_adapters(model_path: str, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = dict(save_strategy="epoch", max_steps=-1, num_train_epochs=1, bf16=True, use_cpu=True)
    ranks = launch("fsdp2-full", train, model_path, str(tmp_path), dtype=torch.bfloat16, **kwargs)
    assert ranks[0]["dtypes"] == {"torch.float32"} and ranks[0]["losses"] == ranks[1]["losses"]
    for saved in (tmp_path / "checkpoint-8", tmp_path / "final"):
        assert {tensor.dtype for tensor in adapter(saved).values()} == {torch.float32}


def test_state_dict_holds_adapters_and_empty_frozen_entries(model_path: str, tmp_path: Path) -> None:
    for found in launch("fsdp2-full", _inspect_state_dict, model_path, str(tmp_path)):
        assert len(found["trainable"]) == 28 and found["entries"] >= found["parameters"] > found["trainable"]
        assert found["with_values"] == found["sharded"] == found["trainable"]
        assert adapter(tmp_path).keys() == {name.replace(".default", "") for name in found["trainable"]}


def _inspect_state_dict(model_path: str, output_dir: str) -> dict[str, set[str]]:
    model = model_of(make_trainer(model_path, output_dir))
    entries = model.state_dict()
    model.save_pretrained(output_dir)  # on every rank, gathers, one rank writes
    return {
        "parameters": {name for name, _ in model.named_parameters()},
        "trainable": {name for name, parameter in model.named_parameters() if parameter.requires_grad},
        "entries": {*entries},
        "with_values": {name for name, tensor in entries.items() if tensor.numel()},
        "sharded": {name for name, tensor in entries.items() if isinstance(tensor, DTensor) and tensor.numel()},
    }


def test_settings_that_cannot_work_are_refused(model_path: str, tmp_path: Path) -> None:
    for messages, same_size_is_nothing in launch("fsdp2-full", _refusals, model_path, str(tmp_path)):
        needed = ("bf16_full_eval", "chat_template_path", "adapter_model.safetensors")
        assert all(word in message for word, message in zip(needed, messages, strict=True))
        assert same_size_is_nothing


def _refusals(model_path: str, output_dir: str) -> tuple[list[str], bool]:
    with pytest.raises(ConfigError) as full_eval:
        make_trainer(model_path, output_dir, bf16_full_eval=True, use_cpu=True)
    trainer = make_trainer(model_path, output_dir)
    model = model_of(trainer)
    same_size_is_nothing = model.resize_token_embeddings(259) is model.get_input_embeddings()
    with pytest.raises(ConfigError) as resized:
        model.resize_token_embeddings(259, pad_to_multiple_of=64)
    with pytest.raises((ConfigError, RuntimeError)) as resumed:
        trainer.train(resume_from_checkpoint=_folder_with_state_only(output_dir))
    return [str(caught.value) for caught in (full_eval, resized, resumed)], same_size_is_nothing


def _folder_with_state_only(output_dir: str) -> str:
    folder = Path(output_dir) / "checkpoint-1"
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text('{"global_step": 1, "train_batch_size": 1, "log_history": []}')
    torch.distributed.barrier()
    return str(folder)


def test_resuming_another_adapter_is_refused_on_every_rank(
    finished: Finished, model_path: str, tmp_path: Path
) -> None:
    resume = str(finished["fsdp2-full"][0] / "checkpoint-2")
    messages = launch("fsdp2-full", _resume_with_rank_8, model_path, str(tmp_path), resume)
    assert all("does not fit the model's adapter" in message and "(4, 96)" in message for message in messages)


def _resume_with_rank_8(model_path: str, output_dir: str, resume: str) -> str:
    with pytest.raises((ConfigError, RuntimeError)) as caught:
        train(model_path, output_dir, resume=resume, lora={"r": 8})
    return str(caught.value)


def test_processes_that_would_train_alone_are_refused(model_path: str, tmp_path: Path) -> None:
    """Two processes on CPU without use_cpu: accelerate opens the process group and forgets it."""
    env = {"HF_HUB_OFFLINE": "1"}
    for message in run_distributed(_alone, model_path, str(tmp_path), env=env):
        assert "2 processes" in message and "each would train alone" in message


def _alone(model_path: str, output_dir: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make_trainer(model_path, output_dir)
    return str(caught.value)


def test_model_loaded_for_another_engine_is_refused(model_path: str, tmp_path: Path) -> None:
    [message] = launch("fsdp2-one-rank", _mismatch, model_path, str(tmp_path))
    assert "set up for FSDP2" in message and "loaded for 'ddp'" in message


def _mismatch(model_path: str, output_dir: str) -> str:
    from transformers import Trainer, TrainingArguments

    from hf_fsdp_qlora.trainer_compat import attach

    model = AutoModelForCausalLM.from_pretrained(model_path)
    attach(model, engine="ddp")
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=output_dir, report_to=[]))
    trainer.accelerator.state.fsdp_plugin = make_trainer(model_path, output_dir).accelerator.state.fsdp_plugin
    with pytest.raises(ConfigError) as caught:
        trainer.create_accelerator_and_postprocess()
    return str(caught.value)


def test_models_that_are_not_ours_see_stock_code(model_path: str, tmp_path: Path) -> None:
    [empty_entries] = launch("one-process", _stock_story, model_path, str(tmp_path))
    assert empty_entries == []
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()


def _stock_story(model_path: str, output_dir: str) -> list[str]:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    from hf_fsdp_qlora.trainer_compat import install

    install()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), LoraConfig(task_type="CAUSAL_LM"))
    args = TrainingArguments(output_dir=output_dir, report_to=[], max_steps=2, save_steps=1, bf16_full_eval=False)
    collator = DataCollatorForLanguageModeling(make_tokenizer(), mlm=False)
    trainer = Trainer(model=model, args=args, train_dataset=make_data(8), data_collator=collator)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(Path(output_dir) / "checkpoint-1"))
    return [name for name, tensor in model.state_dict().items() if not tensor.numel()]
