"""Under FSDP2 a step of the stock SFTTrainer gathers the packed bytes, once for forward and once for backward."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_fsdp_qlora import QuantizedLinear
from hf_fsdp_qlora.skeleton import decoder_layers
from tests.collectives import CollectiveLog, expected_bytes
from tests.tiny_models import save_tiny_model
from tests.trainer_story import launch, make_trainer, model_of

LAYERS = 3
DTYPE = torch.bfloat16


class _CountOneStep(TrainerCallback):
    """Enters the log for the second step."""

    def __init__(self) -> None:
        self.log: CollectiveLog | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.log is not None and state.global_step == 1:
            self.log.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.log is not None and state.global_step == 2:
            self.log.__exit__(None, None, None)


def _step(model_path: str, output_dir: str, accumulation: int, reshard: bool) -> dict[str, Any]:
    os.environ["FSDP_RESHARD_AFTER_FORWARD"] = str(reshard).lower()
    counter = _CountOneStep()
    trainer = make_trainer(
        model_path, output_dir, callbacks=[counter], dtype=DTYPE, gradient_accumulation_steps=accumulation,
        max_steps=2, save_strategy="no",
    )  # fmt: skip
    model = model_of(trainer)
    counter.log = CollectiveLog(model)
    passes = 2 if reshard else 1
    expected = expected_bytes(model, decoder_layers(model.get_base_model()), DTYPE.itemsize, passes=passes)
    trainer.train()
    rows = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return {
        "gathered": counter.log.gathered(),
        "expected": expected,
        "times": counter.log.times_gathered(),
        "others": counter.log.others(),
        # What rows are in bytes, said without FSDP2: an odd number of them is padded to two equal shards.
        "packed": sum(layer.num_rows * layer.backend.format.row_bytes for layer in rows),
        "padding": sum(layer.num_rows % 2 * layer.backend.format.row_bytes for layer in rows),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS))


@pytest.mark.parametrize(("accumulation", "reshard"), [(1, True), (2, True), (1, False)])
def test_a_step_gathers_packed_rows_and_no_more(
    accumulation: int, reshard: bool, model_path: str, tmp_path: Path
) -> None:
    for rank in launch("fsdp2-full", _step, model_path, str(tmp_path), accumulation, reshard):
        passes = 2 if reshard else 1
        assert rank["gathered"]["rows"] == accumulation * passes * (rank["packed"] + rank["padding"])
        # Adapters and norms travel in the compute dtype. The embedding and the head are gathered once, for forward.
        assert rank["gathered"] == {kind: accumulation * value for kind, value in rank["expected"].items()}
        outside = {name: times for name, times in rank["times"].items() if ".layers." not in name}
        assert outside == {f"base_model.model.model.{name}": accumulation for name in ("embed_tokens", "norm")}
        # float32 gradients of the adapters, once per step; and a few bytes for logging and clipping.
        assert rank["others"].pop("_reduce_scatter_base_") == (LAYERS, 4 * rank["trained"])
        assert sum(num_bytes for _, num_bytes in rank["others"].values()) < 1024
