"""The stock SFTTrainer as several benchmarks use it: tiny batches of equal length, accumulation, clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from tiny_llama import SEQUENCES, make_tokenizer
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

ACCUMULATION = 2


def make_trainer(
    model: Any,
    output_dir: str,
    train: Tensor,
    *,
    evaluate: Tensor | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **config: Any,
) -> SFTTrainer:
    """A stock trainer whose global batch is SEQUENCES, whatever the number of ranks.

    Args:
        train: (sequences, tokens) ids.
        evaluate: likewise; None leaves evaluation out.
        config: fields of `SFTConfig` over the ones here.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    batch = SEQUENCES // ranks // ACCUMULATION
    settings: dict[str, Any] = dict(
        output_dir=output_dir, logging_steps=1, report_to=[], bf16=True, per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch, gradient_accumulation_steps=ACCUMULATION, learning_rate=1e-3,
        max_grad_norm=1.0, gradient_checkpointing=True, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )  # fmt: skip
    args = SFTConfig(**{**settings, **config})
    args._n_gpu = min(args.n_gpu, 1)  # a plain process must not become DataParallel where there are two GPUs
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=_dataset(train),
        eval_dataset=None if evaluate is None else _dataset(evaluate),
        processing_class=make_tokenizer(),
        callbacks=list(callbacks),
    )


def logged(trainer: SFTTrainer, key: str) -> list[float]:
    """Every logged value of that name, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _dataset(sequences: Tensor) -> Dataset:
    return Dataset.from_list([{"input_ids": row} for row in sequences.tolist()])
