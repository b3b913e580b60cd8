"""One run of the sweep in rotary_sweep.py: a method, its settings and a seed; the evaluation losses that it reaches.

The settings are those of shakespeare.py: 8 sequences of 512 packed tokens per step, AdamW without weight decay,
clipping 1.0, 10 warm-up steps, a cosine to 10 %, bf16 autocast. A loop of its own stands for the Trainer, which draws
batches otherwise and costs more than a step of this model; rotary training is the package's own, called in the
Trainer's order (optimizer from `Rotary.optimizer`, `RotaryCallback` at the beginning, before steps and after them).

Methods: "full" (stock model, fp32 weights), "lora" (fp32 adapters on an unquantised base), "rotary", and "fixed",
which is rotary training that stays with the blocks of its first visit.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig
from shakespeare import CLIP_NORM, batches, evaluate, lr_fraction
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from hf_fsdp_qlora import load_model
from hf_fsdp_qlora.rotary.config import RotaryConfig
from hf_fsdp_qlora.rotary.evaluation import masters_in_forward
from hf_fsdp_qlora.rotary.prepare import Rotary, prepare_rotary

EVAL_BATCH = 33


@dataclass(frozen=True)
class Job:
    """What one run does.

    Args:
        method: "full", "lora", "rotary" or "fixed".
        lr: peak learning rate.
        seed: of batches, of the order of blocks, and of adapters.
        rank: of LoRA.
        layers: decoder layers that are active at a time.
        frozen: format of parked layers.
        moments: of parked blocks, "reset" or "keep".
        steps_per_block: of a visit.
        warmup: steps at the start of each visit.
        always_active: kinds of blocks that do not rotate; a kind that is not among them takes turns with the layers.
        dtype: of the model's weights in rotary training; masters are float32.
    """

    method: str
    lr: float
    seed: int = 0
    rank: int = 0
    layers: int = 0
    frozen: str = ""
    moments: str = ""
    steps_per_block: int = 0
    warmup: int = 0
    always_active: tuple[str, ...] = ()
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        """Names the run in the file of results."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Args:
        model: folder of the base model.
        training: (n, 512) token ids on the device.
        evaluation: (m, 512) token ids on the device.
        steps: of training; also of the schedule.
        batch: sequences per step.
        eval_at: steps after which the loss is taken.
    """

    model: str
    training: Tensor
    evaluation: Tensor
    steps: int
    batch: int
    eval_at: tuple[int, ...]


def run_job(job: Job, setting: Setting) -> dict[str, Any]:
    """Train and evaluate.

    Returns:
        The job's fields; `losses` by step, of what would be saved; `device_losses` of the model with its quantised
        blocks, for rotary training; `seconds`.
    """
    started = time.perf_counter()
    torch.manual_seed(job.seed)
    make: dict[str, Callable[[Job, Setting], _Run]] = {"full": _full, "lora": _lora}
    with tempfile.TemporaryDirectory() as folder:
        run = make[job.method](job, setting) if job.method in make else _rotary(job, setting, folder)
        losses, device_losses = _train(run, job, setting)
    return {
        **asdict(job), "losses": losses, "device_losses": device_losses,
        "trained": run.trained, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


@dataclass
class _Run:
    model: Any
    optimizer: torch.optim.Optimizer
    trained: int
    rotary: Rotary | None = None
    args: TrainingArguments | None = None


def _full(job: Job, setting: Setting) -> _Run:
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).to(setting.training.device)
    return _stock(model, job.lr)


def _lora(job: Job, setting: Setting) -> _Run:
    config = LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return _stock(load_model(setting.model, peft_config=config, dtype=torch.float32, seed=job.seed), job.lr)


def _stock(model: nn.Module, lr: float) -> _Run:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = parameters[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=fused)
    return _Run(model, optimizer, sum(parameter.numel() for parameter in parameters))


def _rotary(job: Job, setting: Setting, folder: str) -> _Run:
    config = RotaryConfig(
        active=job.layers, steps_per_block=setting.steps if job.method == "fixed" else job.steps_per_block,
        frozen=job.frozen, moments=job.moments or "reset", always_active=job.always_active, seed=job.seed,
        warmup_steps=job.warmup,
    )  # fmt: skip
    model: Any = load_model(setting.model, rotary=config, dtype=job.dtype)
    rotary = prepare_rotary(model, config)
    is_cuda = setting.training.device.type == "cuda"
    args = TrainingArguments(
        output_dir=folder, optim="adamw_torch_fused" if is_cuda else "adamw_torch", learning_rate=job.lr,
        weight_decay=0.0, report_to=[], use_cpu=not is_cuda, max_steps=setting.steps,
    )  # fmt: skip
    optimizer_cls, kwargs = rotary.optimizer(args)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_cls([{"params": parameters, "weight_decay": 0.0}], **kwargs)
    active = rotary.plan.numel_of(rotary.schedule.blocks_of_visit(0))
    return _Run(model, optimizer, active, rotary, args)


def _train(run: _Run, job: Job, setting: Setting) -> tuple[dict[int, float], dict[int, float]]:
    device_type = setting.training.device.type
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: lr_fraction(step, setting.steps))
    state, control = TrainerState(), TrainerControl()
    losses: dict[int, float] = {}
    device_losses: dict[int, float] = {}
    _call(run, "on_train_begin", state, control)
    drawn = batches(setting.training, setting.steps, seed=job.seed, batch=setting.batch)
    for step, batch in enumerate(drawn, start=1):
        run.model.train()
        with torch.autocast(device_type, torch.bfloat16):
            loss = run.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in run.model.parameters() if p.grad is not None], CLIP_NORM)
        _call(run, "on_pre_optimizer_step", state, control)
        run.optimizer.step()
        schedule.step()
        run.optimizer.zero_grad()
        state.global_step = step
        _call(run, "on_step_end", state, control)
        if step in setting.eval_at:
            with torch.autocast(device_type, torch.bfloat16):
                if run.rotary is not None:
                    device_losses[step] = evaluate(run.model, setting.evaluation, batch=EVAL_BATCH)
                with _exact(run):
                    losses[step] = evaluate(run.model, setting.evaluation, batch=EVAL_BATCH)
    return losses, device_losses


def _call(run: _Run, event: str, state: TrainerState, control: TrainerControl) -> None:
    if run.rotary is not None:
        handler = getattr(run.rotary.callback, event)
        handler(run.args, state, control, model=run.model, optimizer=run.optimizer)


@contextlib.contextmanager
def _exact(run: _Run) -> Iterator[None]:
    """The weights that would be saved."""
    context: AbstractContextManager[None] = contextlib.nullcontext()
    if run.rotary is not None:
        context = masters_in_forward(run.model, run.rotary.active)
    with context:
        yield
