"""Under FSDP2 a step of the stock SFTTrainer gathers the packed bytes, once for forward and once for backward."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
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


def _kernel(name: str, stream: int, start_us: float, end_us: float) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start_us, "dur": end_us - start_us, "args": {"stream": stream}}


def test_trace_overlap_tells_hidden_from_waiting(tmp_path: Path) -> None:
    events = [
        _kernel("gemm", 7, 0, 1000), _kernel("norm", 7, 900, 1500), _kernel("gemm", 7, 3000, 4000),  # 2.5 ms
        _kernel("ncclDevKernel_AllGather_RING_LL", 20, 500, 1200),  # 0.7 ms, all of it beside compute
        _kernel("ncclDevKernel_AllGather_RING_LL", 20, 2000, 3300),  # 1.3 ms, 0.3 of it
        _kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 22, 0, 5000),
        _kernel("copy into a buffer", 18, 2000, 2500),
        {"cat": "gpu_user_annotation", "name": "gemm", "ts": 0, "dur": 9000, "args": {"stream": 7}},
        {"name": "process_name", "ph": "M"},
    ]  # fmt: skip
    trace = tmp_path / "trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    script = Path(__file__).parent.parent / "benchmarks" / "trace_overlap.py"
    told = subprocess.run([sys.executable, str(script), str(trace)], capture_output=True, text=True, check=True)
    assert told.stdout == f"{trace}: 2 all-gathers, 2.0 ms, of which 50% beside compute (2.5 ms in all)\n"
