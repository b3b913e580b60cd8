"""What each process of test_two_hosts.py runs under `accelerate launch`: load, train, say what was read.

host_story.py MODEL OUTPUT_DIR REPORT_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.trainer_story import make_trainer, model_of, report


def main(model_path: str, output_dir: str, report_dir: str) -> None:
    trainer = make_trainer(
        model_path, output_dir, use_cpu=True, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        max_steps=2, save_steps=2, learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    model = model_of(trainer)
    [shape] = {tuple(p.device_mesh.shape) for p in model.parameters() if isinstance(p, DTensor)}
    answer = {**report(trainer), "read_bytes": model.load_report.read_bytes, "mesh": shape}
    answer["dtypes"] = sorted(answer["dtypes"])
    (Path(report_dir) / f"{dist.get_rank()}.json").write_text(json.dumps(answer))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
