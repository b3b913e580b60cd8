"""What trainer_check.py lets every rank do: train with the stock SFTTrainer, and evaluate with stock code alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from stock_trainer import logged, make_trainer
from tiny_llama import SEQUENCES, four_bit, tokens
from transformers import AutoModelForCausalLM

from hf_fsdp_qlora import WeightIntegrityCallback, load_model

STEPS, SAVED_AT = 6, 3
NEW_TOKENS = 8
CLIP_NORM = 0.2
"""Below the norm of every step's gradient."""


@dataclass(frozen=True)
class Run:
    """Settings of one run.

    Args:
        dtype: bfloat16 trains in the Trainer's mixed precision, float32 without any.
        offload: of `load_model`.
        head: train the head too.
        config: fields of `SFTConfig`, over those of `train`.
    """

    dtype: torch.dtype = torch.bfloat16
    offload: str = "none"
    head: bool = False
    config: dict[str, Any] = field(default_factory=dict)


FP32 = torch.float32
BEST = Run(
    head=True,
    config=dict(
        eval_steps=1, save_steps=1, load_best_model_at_end=True, save_total_limit=2, learning_rate=0.2, max_steps=4,
        lr_scheduler_type="constant",
    ),
)  # fmt: skip
"""Learns too fast, so that the last checkpoint is not the best one."""

RUNS: dict[tuple[str, str], Run] = {
    ("one", "bf16"): Run(),
    ("one", "fp32"): Run(FP32),
    ("one", "head"): Run(FP32, head=True),
    ("fsdp2", "bf16"): Run(),
    ("fsdp2", "fp32"): Run(FP32),
    ("offload", "base"): Run(FP32, offload="base"),
    ("offload", "all"): Run(FP32, offload="all"),
    ("fsdp2", "head"): Run(FP32, head=True),
    ("fsdp2", "best"): BEST,
    ("sharded", "bf16"): Run(),
    ("sharded", "fp32"): Run(FP32),
    ("sharded", "best"): BEST,
    ("one-rank", "fp32"): Run(FP32),
    ("ddp", "fp32"): Run(FP32),
}
ENV = {"all": {"FSDP_OFFLOAD_PARAMS": "true"}}
"""By run: what the launcher would set besides."""

RESUMED: list[tuple[str, tuple[str, str]]] = [
    ("fsdp2", ("fsdp2", "bf16")),
    ("fsdp2", ("fsdp2", "fp32")),
    ("sharded", ("sharded", "bf16")),
    ("sharded", ("sharded", "fp32")),
    ("one-rank", ("fsdp2", "fp32")),
    ("one-rank", ("sharded", "fp32")),
    ("fsdp2", ("one-rank", "fp32")),
    ("sharded", ("one-rank", "fp32")),
    ("offload", ("offload", "all")),
]
"""(engine that goes on, run whose middle checkpoint it takes)"""

STOCK = [("fsdp2", "bf16"), ("fsdp2", "fp32"), ("sharded", "fp32"), ("fsdp2", "head"), ("sharded", "bf16")]
"""Runs whose final adapter stock code evaluates."""


@dataclass(frozen=True)
class Report:
    """What one rank saw.

    Attributes:
        before, after: greedy continuations of two prompts, one per line, without and with the trained adapter.
        evaluated: the evaluation loss before training.
        eval_losses: of the evaluations during training.
        best: the best checkpoint, if the trainer looked for it.
        rows: quantised rows that were compared at the end.
        device: where the base model says that it computes.
    """

    before: list[list[int]]
    after: list[list[int]]
    evaluated: float
    losses: list[float]
    eval_losses: list[float]
    grad_norms: list[float]
    best: str | None
    rows: int
    device: str
    adapter_dtypes: set[torch.dtype]


def train(path: str, output_dir: str, run: Run, checkpoint: str | None = None) -> Report:
    """On every rank: generate, evaluate, train with evaluation and saving in between, save, generate."""
    model: Any = load_model(
        path,
        quantization_config=four_bit(run.dtype),
        peft_config=LoraConfig(
            r=8, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["lm_head"] if run.head else None
        ),
        dtype=run.dtype,
        offload=run.offload,
    )
    integrity = WeightIntegrityCallback(every_n_steps=2)
    settings: dict[str, Any] = dict(
        bf16=run.dtype == torch.bfloat16, max_steps=STEPS, save_steps=SAVED_AT, eval_strategy="steps",
        eval_steps=SAVED_AT, learning_rate=5e-3, lr_scheduler_type="linear", max_grad_norm=CLIP_NORM,
    )  # fmt: skip
    trainer = make_trainer(
        model, output_dir, tokens().repeat(STEPS, 1), evaluate=tokens(), callbacks=[integrity],
        **{**settings, **run.config},
    )  # fmt: skip
    before = generate(trainer.model)
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.state.log_history.clear()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(Path(output_dir) / "final"))
    return Report(
        before=before,
        after=generate(trainer.model),
        evaluated=evaluated,
        losses=logged(trainer, "loss"),
        eval_losses=logged(trainer, "eval_loss"),
        grad_norms=logged(trainer, "grad_norm"),
        best=trainer.state.best_model_checkpoint,
        rows=integrity.check(),
        device=model.get_base_model().device.type,
        adapter_dtypes={parameter.dtype for parameter in model.parameters() if parameter.requires_grad},
    )


def generate(model: Any) -> list[list[int]]:
    """Greedy continuations of two prompts, on every rank."""
    model.eval()
    prompts = tokens(2)[:, :8].to(PartialState().device)
    mask = torch.ones_like(prompts)
    continued = model.generate(
        input_ids=prompts, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert continued.device == prompts.device
    return continued[:, prompts.shape[1] :].tolist()


def stock_losses(path: str, directory: str, dtype: torch.dtype) -> tuple[float, float]:
    """Evaluation losses of the stock 4-bit model under stock PEFT, without and with a saved adapter."""
    device = PartialState().device
    base = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=four_bit(dtype), dtype=dtype, device_map={"": device}
    )
    plain = stock_loss(base)
    return plain, stock_loss(PeftModel.from_pretrained(base, directory))


def stock_loss(model: Any) -> float:
    """Mean over the evaluation data. No dropout here; bitsandbytes' CPU layers round differently in eval mode."""
    model.train()
    device = PartialState().device
    with torch.no_grad():
        losses = [
            model(input_ids=ids, labels=ids, use_cache=False).loss for ids in tokens(SEQUENCES).to(device)[:, None]
        ]
    return float(torch.stack(losses).mean())


def resumed_name(source: str, run: str) -> str:
    return f"resumed-{source}-{run}"


def stock_name(source: str, run: str) -> str:
    return f"stock-{source}-{run}"
