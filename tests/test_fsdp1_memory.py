"""FSDP1 through accelerate, with torch broadcasting while it wraps, as on a GPU: what is left in memory.

torch and accelerate refuse that broadcast on the CPU, where gloo could do it; here they are told not to look.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fsdp_qlora import fsdp1
from tests.distributed import run_distributed
from tests.tiny_models import save_tiny_model
from tests.trainer_story import fsdp1_env, launch_env, make_trainer, model_of, report


def broadcast_as_on_gpu() -> None:
    """Let `unit_arguments` leave the broadcast to torch in this process."""
    unit_arguments = fsdp1.unit_arguments
    fsdp1._broadcast = lambda *_: None  # type: ignore[assignment]
    fsdp1.unit_arguments = lambda *args, **kwargs: {**unit_arguments(*args, **kwargs), "sync_module_states": True}
    torch.distributed.fsdp._init_utils._check_module_states_for_sync_module_states = lambda *_: None


def train(model_path: str, output_dir: str, broadcast: bool) -> dict[str, Any]:
    """Losses, and (class, shape) of tensors that take as much as the embedding and are no part of the model's."""
    if broadcast:
        broadcast_as_on_gpu()
    trainer = make_trainer(model_path, output_dir, save_strategy="no", max_steps=2)
    gc.collect()
    gc.disable()  # a reference cycle would keep the memory for as long as no collection happens to run
    trainer.train()
    model, config = model_of(trainer), model_of(trainer).config
    embedding_bytes = config.vocab_size * config.hidden_size * 4
    shards = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    beside = [
        (type(tensor).__name__, tuple(tensor.shape)) for tensor in tensors
        if not tensor.is_meta and tensor.untyped_storage().nbytes() >= embedding_bytes
        and tensor.untyped_storage().data_ptr() not in shards
    ]  # fmt: skip
    return {**report(trainer), "beside": beside, "wrapped": type(trainer.model_wrapped).__name__}


@pytest.mark.parametrize("name", ["llama", "qwen2"], ids=["untied", "tied"])
def test_no_rank_keeps_a_whole_weight_that_the_broadcast_filled(name: str, tmp_path: Path) -> None:
    # With this vocabulary nothing is as large as the embedding and the head.
    model = str(save_tiny_model(tmp_path / "model", name, dtype=torch.float32, vocab_size=2048))
    [expected] = run_distributed(
        train, model, str(tmp_path / "one"), False, world_size=1, env=launch_env("plain"), process_group=False
    )
    env = fsdp1_env(use_orig_params=False)
    for result in run_distributed(train, model, str(tmp_path / "two"), True, env=env, process_group=False):
        assert result["wrapped"] == "FullyShardedDataParallel" and result["beside"] == []
        # The order of float32 sums differs: ranks see other parts of the batch. An untied or empty head would show.
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
