"""Training only the layers that `expand` added. References: one process without FSDP, the uninterrupted run, and the
merged folder in stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_fsdp_qlora import ConfigError, QuantizedLinear, load_model
from hf_fsdp_qlora.config import load_recipe
from hf_fsdp_qlora.expand import expand_checkpoint, read_expansion
from hf_fsdp_qlora.merge import merge_adapter
from hf_fsdp_qlora.new_layers import new_layers_config
from hf_fsdp_qlora.resources import find_recipe
from hf_fsdp_qlora.train import adapter_config, quantization_config
from tests.distributed import run_distributed
from tests.loading_story import batch, nf4
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import make_tokenizer
from tests.trainer_story import launch_env, make_data, report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    base = save_tiny_model(path / "base", dtype=torch.float32)
    expand_checkpoint(base, path / "expanded", new_layers=2)
    return path / "expanded"


def train(path: str, output_dir: str, dtype: str, resume: str | None = None) -> dict[str, Any]:
    expansion = read_expansion(path)
    model = load_model(
        path, quantization_config=nf4(llm_int8_skip_modules=expansion.new_modules),
        peft_config=new_layers_config(expansion), dtype=DTYPES[dtype],
    )  # fmt: skip
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    args = SFTConfig(
        output_dir=output_dir, per_device_train_batch_size=2 // world_size, max_steps=4, logging_steps=1,
        save_strategy="steps", save_steps=2, report_to=[], learning_rate=1e-3, max_length=64, bf16=dtype == "bf16",
        use_cpu=True, disable_tqdm=True, gradient_checkpointing=True, max_grad_norm=0.1,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=make_data(16), processing_class=make_tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(Path(output_dir) / "final"))
    trained = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.eval()
    with torch.no_grad():
        return {**report(trainer), "trained": trained, "logits": model(batch()["input_ids"]).logits}


def trained_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


def test_two_ranks_train_the_new_layers_alone_and_resume(expanded: Path, tmp_path: Path) -> None:
    env = launch_env("fsdp2")
    whole = run_distributed(train, str(expanded), str(tmp_path / "whole"), "fp32", env=env)
    resume = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run_distributed(train, str(expanded), str(tmp_path / "resumed"), "fp32", resume, env=env)
    plain = launch_env("plain")
    [single] = run_distributed(
        train, str(expanded), str(tmp_path / "single"), "fp32", world_size=1, env=plain, process_group=False
    )
    modules = [f"base_model.model.{name}." for name in read_expansion(expanded).new_modules]
    for rank in whole:
        assert rank["dtypes"] == {"torch.float32"} and len(rank["trained"]) == len(modules) == 2 * 9
        assert all(any(name.startswith(module) for module in modules) for name in rank["trained"])
        # Two ranks and one differ by the order of float32 sums.
        assert rank["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert [rank["losses"] for rank in resumed] == [rank["losses"] for rank in whole]
    first, second = trained_tensors(tmp_path / "whole"), trained_tensors(tmp_path / "resumed")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_result_merges_into_a_plain_folder(expanded: Path, tmp_path: Path) -> None:
    run_distributed(train, str(expanded), str(tmp_path / "run"), "fp32", env=launch_env("fsdp2"))
    merge_adapter(tmp_path / "run" / "final", tmp_path / "merged", base_model=expanded)
    old, new = (load_file(path / "model.safetensors") for path in (expanded, tmp_path / "merged"))
    modules = read_expansion(expanded).new_modules
    saved = trained_tensors(tmp_path / "run")
    trained = {key.removeprefix("base_model.model."): value for key, value in saved.items()}
    assert trained.keys() == {f"{module}.weight" for module in modules} and old.keys() == new.keys()
    for key in old:
        assert torch.equal(new[key], trained.get(key, old[key]))
    # Zero projections hide the rest of a layer from the first gradient only, so every tensor has moved by the end.
    assert all(not torch.equal(value, old[key]) for key, value in trained.items())
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(expanded, dtype=torch.float32)
        over_base = PeftModel.from_pretrained(base, str(tmp_path / "run" / "final"))
        assert torch.equal(stock(batch()["input_ids"]).logits, over_base(batch()["input_ids"]).logits)


def test_masters_stay_fp32_in_a_bf16_run(expanded: Path, tmp_path: Path) -> None:
    ranks = run_distributed(train, str(expanded), str(tmp_path), "bf16", env=launch_env("fsdp2"))
    assert all(rank["dtypes"] == {"torch.float32"} and rank["logits"].dtype == torch.bfloat16 for rank in ranks)
    assert {value.dtype for value in trained_tensors(tmp_path).values()} == {torch.float32}


def test_recipe_trains_the_layers_in_the_record(expanded: Path, tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe("llama_pro/7b_plus8"), {"model_name_or_path": str(expanded)})
    config = adapter_config(recipe)
    assert config is not None and config.modules_to_save == read_expansion(expanded).new_modules  # type: ignore[attr-defined]
    assert quantization_config(recipe).llm_int8_skip_modules == read_expansion(expanded).new_modules  # type: ignore[union-attr]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    recipe = load_recipe(find_recipe("llama_pro/7b_plus8"), {"model_name_or_path": str(tmp_path)})
    with pytest.raises(ConfigError, match="no expansion.json"):
        adapter_config(recipe)
