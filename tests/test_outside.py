"""A head that is whole on every rank, an embedding in host memory: the same training as one process, bit for bit where
the sums are the same, and nothing of them gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from hf_fsdp_qlora import ConfigError, load_model
from hf_fsdp_qlora.integrity import IntegrityError, check_integrity, check_replicas
from tests.distributed import run_distributed
from tests.loading_story import CPU, FSDP2, LORA, batch, nf4
from tests.test_hsdp import hsdp
from tests.tiny_models import save_tiny_model
from tests.trainer_story import adapter, assert_equal, launch, launch_env, make_trainer, report, train

WHOLE: dict[str, Any] = dict(replicate_head=True, embedding_on_host=True)
OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.float32))


def step(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """One step on batches that differ by rank, and which parameters were gathered in it."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    model: Any = load_model(path, quantization_config=nf4(), peft_config=lora, dtype=torch.float32, **options)
    gathered: list[str] = []
    stock = _fsdp_param_group.foreach_all_gather

    def watched(parameters: list[Any], *args: Any) -> Any:
        gathered.extend(parameter._param_fqn.removeprefix("base_model.model.") for parameter in parameters)
        return stock(parameters, *args)

    _fsdp_param_group.foreach_all_gather = watched  # type: ignore[assignment]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    loss = model(**batch()).loss
    forward = [*gathered]
    gathered.clear()
    loss.backward()
    names = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in names.items() if p.grad is not None}
    return {
        "loss": loss.item(),
        "grads": {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()},
        "forward": forward,
        "backward": [*gathered],
        "plain": {name: p.numel() * p.itemsize for name, p in names.items() if not isinstance(p, DTensor)},
        "generated": model.generate(input_ids=batch()["input_ids"][:, :4], max_new_tokens=4, do_sample=False).tolist(),
        "rows": check_integrity(model),
        "report": model.load_report,
    }


@pytest.mark.parametrize("offload", ["none", "base", "all"])
@pytest.mark.parametrize("options", [WHOLE, {"replicate_head": True}, {"embedding_on_host": True}], ids=str)
def test_a_step_equals_one_process_and_gathers_no_head(options: dict[str, Any], offload: str, model_path: str) -> None:
    [one] = run_distributed(step, model_path, {}, world_size=1, env=CPU, process_group=False)
    kept = {"model.norm.weight", "lm_head.weight"} if "replicate_head" in options else set()
    kept |= {"model.embed_tokens.weight"} if "embedding_on_host" in options else set()
    for rank in run_distributed(step, model_path, {**options, "offload": offload}, env=FSDP2):
        assert rank["plain"].keys() == kept
        assert OUTSIDE & {*rank["forward"]} == OUTSIDE - kept
        assert not OUTSIDE & {*rank["backward"]}, "a frozen embedding is not needed there"
        assert rank["loss"] == one["loss"] and rank["generated"] == one["generated"]
        assert rank["grads"].keys() == one["grads"].keys()
        # Both ranks see the same batch: the mean of two equal gradients, exact in fp32.
        assert all(torch.equal(grad, one["grads"][name]) for name, grad in rank["grads"].items())
        assert rank["rows"] > 0
        assert rank["report"].total_bytes - rank["report"].sharded_bytes == sum(rank["plain"].values())


def test_whole_parameters_are_read_by_every_rank(model_path: str) -> None:
    sharded, whole = (
        [rank["report"] for rank in run_distributed(step, model_path, options, env=FSDP2)] for options in ({}, WHOLE)
    )
    outside = whole[0].total_bytes - whole[0].sharded_bytes
    assert outside == (2 * 259 + 1) * 96 * 4
    for total in ("read_bytes", "local_bytes"):
        assert sum(getattr(rank, total) for rank in whole) - sum(getattr(rank, total) for rank in sharded) == outside


RUN: dict[str, Any] = dict(eval_strategy="steps", eval_steps=2, load=WHOLE)


@pytest.mark.parametrize("engine", ["fsdp2-full", "fsdp2-sharded"])
def test_training_saving_and_resuming_as_with_a_sharded_head(engine: str, model_path: str, tmp_path: Path) -> None:
    """fp32, accumulation 2, clipping, evaluation every second step. The order of sums does not change: bit-equal."""

    def run(name: str, resume: str | None = None, **kwargs: Any) -> list[dict[str, Any]]:
        return launch(engine, train, model_path, str(tmp_path / name), resume=resume, **{**RUN, **kwargs})

    sharded, whole = run("sharded", load={}), run("whole")
    assert [rank["losses"] for rank in whole] == [rank["losses"] for rank in sharded]
    assert [rank["grad_norms"] for rank in whole] == [rank["grad_norms"] for rank in sharded]
    assert_equal(adapter(tmp_path / "whole" / "final"), adapter(tmp_path / "sharded" / "final"))
    resumed = run("resumed", str(tmp_path / "sharded" / "checkpoint-2"))
    assert resumed[0]["losses"] == whole[0]["losses"]
    assert_equal(adapter(tmp_path / "resumed" / "final"), adapter(tmp_path / "whole" / "final"))


def evaluate_then_train(path: str, output_dir: str, load: dict[str, Any]) -> dict[str, Any]:
    trainer = make_trainer(path, output_dir, load=load)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return {"before": before, "after": trainer.evaluate()["eval_loss"], **report(trainer)}


def test_evaluation_before_and_after_training(model_path: str, tmp_path: Path) -> None:
    whole, sharded = (
        launch("fsdp2-full", evaluate_then_train, model_path, str(tmp_path / str(len(load))), load)
        for load in (WHOLE, {})
    )
    assert whole[0] | {"best": None} == sharded[0] | {"best": None}
    assert whole[0]["after"] != whole[0]["before"]


def load_plain(path: str, options: dict[str, Any]) -> float:
    model: Any = load_model(path, quantization_config=nf4(), peft_config=LORA, dtype=torch.float32, **options)
    return model(**batch()).loss.item()


def test_replicas_of_hsdp(model_path: str) -> None:
    [one] = run_distributed(load_plain, model_path, {}, world_size=1, env=CPU, process_group=False)
    four = run_distributed(load_plain, model_path, WHOLE, world_size=4, env=hsdp(2, 2), process_group=False)
    assert four == [one] * 4


def damage(path: str) -> list[str]:
    """The errors after one rank's head, then one rank's embedding, has another value."""
    model: Any = load_model(path, quantization_config=nf4(), peft_config=LORA, dtype=torch.float32, **WHOLE)
    errors = []
    for name in ("lm_head", "model.embed_tokens"):
        weight = model.get_submodule(f"base_model.model.{name}").weight
        if torch.distributed.get_rank() == 1:
            weight.data[3, 5] += 1
        with pytest.raises(IntegrityError) as error:
            check_replicas(model)
        errors.append(str(error.value))
        if torch.distributed.get_rank() == 1:
            weight.data[3, 5] -= 1
    return errors


def test_ranks_with_another_head_are_refused(model_path: str) -> None:
    for errors in run_distributed(damage, model_path, env=FSDP2):
        assert "lm_head.weight" in errors[0] and "model.embed_tokens.weight" in errors[1]


def refusal(path: str, options: dict[str, Any], lora: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        load_model(path, quantization_config=nf4(), peft_config=LoraConfig(r=4, **lora), **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "lora", "message"),
    [
        ({"replicate_head": True}, {"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"embedding_on_host": True}, {"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
    ],
    ids=str,
)
def test_trained_ones_are_refused(options: Any, lora: dict[str, Any], message: str, model_path: str) -> None:
    lora = {"target_modules": "all-linear", **lora}
    for error in run_distributed(refusal, model_path, options, lora, env=FSDP2):
        assert message in error and "is trained" in error and next(iter(options)) in error


def test_tied_embeddings_and_other_engines_are_refused(model_path: str, tmp_path: Path) -> None:
    tied = str(save_tiny_model(tmp_path, "qwen2"))
    plain = {"target_modules": "all-linear"}
    assert "tied" in run_distributed(refusal, tied, WHOLE, plain, env=FSDP2)[0]
    fsdp1 = {**FSDP2, "FSDP_VERSION": "1"}
    assert "replicate_head" in run_distributed(refusal, model_path, {"replicate_head": True}, plain, env=fsdp1)[0]
    on_host = {"embedding_on_host": True}
    [error] = run_distributed(refusal, model_path, on_host, plain, world_size=1, env=CPU, process_group=False)
    assert "embedding_on_host" in error
    [loss] = run_distributed(
        load_plain, model_path, {"replicate_head": True}, world_size=1, env=CPU, process_group=False
    )  # one process has it whole
    assert loss > 0


def train_on_gpu(path: str, output_dir: str, options: dict[str, Any]) -> dict[str, Any]:
    trainer = make_trainer(path, output_dir, dtype=torch.bfloat16, use_cpu=False, bf16=True, load=options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    model: Any = trainer.model
    base = model.get_base_model()
    ids = batch()["input_ids"][:, :4].to("cuda")
    return {
        "eval": (before, trainer.evaluate()["eval_loss"]),
        "losses": report(trainer)["losses"],
        "devices": [weight.device.type for weight in (base.model.embed_tokens.weight, base.lm_head.weight)],
        "computes_on": base.device.type,
        "generated": model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).tolist(),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("offload", ["none", "base"])
def test_training_on_a_gpu(offload: str, model_path: str, tmp_path: Path) -> None:
    """One NCCL rank: the embedding on the host and the head on the GPU, and the same numbers as with shards."""
    env = {**launch_env("fsdp2", wrap="NO_WRAP"), "ACCELERATE_MIXED_PRECISION": "bf16"}
    whole, sharded = (
        run_distributed(
            train_on_gpu, model_path, str(tmp_path / str(len(options))), {**options, "offload": offload},
            world_size=1, process_group=False, env=env,
        )[0]
        for options in (WHOLE, {})
    )  # fmt: skip
    assert whole["devices"] == ["cpu", "cuda"] and whole["computes_on"] == "cuda"
    for key in ("eval", "losses", "generated"):
        assert whole[key] == sharded[key], key
