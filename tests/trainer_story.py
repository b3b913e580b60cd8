"""One training run of the stock SFTTrainer on a tiny model, as a script under `accelerate launch` would do it.

The functions here run inside the ranks that `run_distributed` starts; `launch_env` gives the environment variables
that `accelerate launch` sets (accelerate/utils/launch.py), so that accelerate is configured as it is for users.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_fsdp_qlora.loading import load_model
from tests.distributed import run_distributed
from tests.tiny_tokenizer import make_tokenizer

NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def launch_env(
    engine: str, *, state_dict_type: str = "FULL_STATE_DICT", wrap: str = "TRANSFORMER_BASED_WRAP"
) -> dict[str, str]:
    """What `accelerate launch` sets on CPU for "fsdp2" (nothing says CPU), or a user who sets `use_cpu` ("plain")."""
    env = {"ACCELERATE_MIXED_PRECISION": "no", "HF_HUB_OFFLINE": "1"}
    if engine == "plain":
        return env | {"ACCELERATE_USE_CPU": "true"}
    return env | {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": state_dict_type,
        "FSDP_AUTO_WRAP_POLICY": wrap, "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false",
    }  # fmt: skip


def fsdp1_env(use_orig_params: bool) -> dict[str, str]:
    """What `accelerate launch` sets with fsdp1.yaml, without what it cannot do on CPU (broadcast while wrapping)."""
    env = launch_env("fsdp2")
    del env["FSDP_RESHARD_AFTER_FORWARD"]
    return env | {"FSDP_VERSION": "1", "FSDP_USE_ORIG_PARAMS": str(use_orig_params).lower(),
                  "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}  # fmt: skip


SHARDED = "SHARDED_STATE_DICT"
# name: (world size, environment)
RUNS: dict[str, tuple[int, dict[str, str]]] = {
    "fsdp2-full": (2, launch_env("fsdp2")),
    "fsdp2-sharded": (2, launch_env("fsdp2", state_dict_type=SHARDED, wrap="NO_WRAP")),
    "fsdp2-one-rank": (1, launch_env("fsdp2", wrap="NO_WRAP")),
    "one-process": (1, launch_env("plain")),
    "ddp": (2, launch_env("plain")),
}
FSDP1_RUNS = {"fsdp1-flat": (2, fsdp1_env(False)), "fsdp1-orig": (2, fsdp1_env(True))}


def launch(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """What `function` returned on the ranks of the run of that name in `RUNS` or `FSDP1_RUNS`."""
    world_size, env = (RUNS | FSDP1_RUNS)[name]
    group = name == "ddp"  # as after torchrun; under FSDP accelerate opens it
    return run_distributed(function, *args, world_size=world_size, env=env, process_group=group, **kwargs)


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    """The saved tensors of a PEFT directory."""
    return load_file(directory / "adapter_model.safetensors")


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():  # fp32 sums in another order
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-6, msg=key)


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def make_data(count: int, seed: int = 0) -> Dataset:
    """Random sequences of 10 to 23 tokens, no special ones."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(10, 24, (count,), generator=generator).tolist()
    return Dataset.from_list(
        [{"input_ids": torch.randint(3, 259, (length,), generator=generator).tolist()} for length in lengths]
    )


def make_trainer(
    model_path: str,
    output_dir: str,
    *,
    lora: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    load: dict[str, Any] | None = None,
    data: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: list[TrainerCallback] | None = None,
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    **config: Any,
) -> SFTTrainer:
    """A stock SFTTrainer around what `load_model` returns: accumulation, clipping, checkpointing, tiny everything."""
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **(lora or {})}
    settings_of_load = {"peft_config": LoraConfig(**lora), "dtype": dtype, **(load or {})}
    model = load_model(model_path, quantization_config=BitsAndBytesConfig(**NF4), **settings_of_load)
    settings = dict(
        output_dir=output_dir, per_device_train_batch_size=2 // world_size_of(model), gradient_accumulation_steps=2,
        max_steps=4, logging_steps=1, save_strategy="steps", save_steps=2, report_to=[], max_grad_norm=0.1,
        learning_rate=1e-2, lr_scheduler_type="linear", gradient_checkpointing=True, max_length=64, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    return SFTTrainer(
        model=model,
        args=SFTConfig(**{**settings, **config}),  # type: ignore[arg-type]
        train_dataset=data or make_data(32),
        eval_dataset=make_data(8, seed=1),
        processing_class=tokenizer or make_tokenizer(),
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )


def world_size_of(model: torch.nn.Module) -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def train(model_path: str, output_dir: str, *, resume: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """Train, save to `output_dir/final`, and report what happened on this rank."""
    trainer = make_trainer(model_path, output_dir, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(Path(output_dir) / "final"))
    return report(trainer)


def model_of(trainer: SFTTrainer) -> Any:
    """The trainer's model; its declared type admits anything."""
    return trainer.model


def report(trainer: SFTTrainer) -> dict[str, Any]:
    """Losses and gradient norms by step, and where the best checkpoint is."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [entry["grad_norm"] for entry in logs],
        "best": trainer.state.best_model_checkpoint,
        "dtypes": {str(p.dtype) for p in model_of(trainer).parameters() if p.requires_grad},
    }
