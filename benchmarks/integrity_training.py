"""Two ranks under FSDP2 and one plain process train the same model; byte_integrity.py compares what they return.

The same functions run in both places: they take this rank's part of the global batch, and gather what is sharded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tiny_llama import SEQUENCES, four_bit, make_tokenizer, relative_error, tokens
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl import SFTConfig, SFTTrainer

from hf_fsdp_qlora import QuantizedLinear, load_model

STEPS = 3
LEARNING_RATE = 1e-3
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Trained:
    """Loss of every step over the global batch, and the gradients of the first step, whole and on the CPU."""

    losses: list[float]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """What one side, sharded or not, brings back."""

    by_dtype: dict[torch.dtype, Trained]
    fused_head_losses: list[float]


@dataclass(frozen=True)
class Compiled:
    """A compiled layer beside the eager one: relative L2 errors of the output and of the input gradient."""

    output_error: float
    gradient_error: float


def train_everything(folder: str) -> Training:
    """Run on one process, or on every rank under FSDP2."""
    by_dtype = {dtype: train(folder, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Training(by_dtype, train_with_fused_head(folder))


def train(folder: str, dtype: torch.dtype) -> Trained:
    """A few steps with gradient checkpointing and clipping. LoRA B starts random, so that A has gradients at once."""
    peft_config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = load_model(folder, quantization_config=four_bit(dtype), peft_config=peft_config, dtype=dtype)
    assert isinstance(model, PeftModel)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=LEARNING_RATE, weight_decay=0.0)
    batch = tokens().to(PartialState().device)[_rank() :: _world_size()]
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for _ in range(STEPS):
        with _mixed_precision(dtype):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        losses.append(_mean(loss))
        gradients = gradients or {name: _whole(parameter.grad) for name, parameter in named.items()}
        torch.nn.utils.clip_grad_norm_(named.values(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, gradients)


def train_with_fused_head(folder: str) -> list[float]:
    """Losses of a stock SFTTrainer that trains the head too; TRL's fused head reads its weight outside its forward."""
    model = load_model(
        folder,
        quantization_config=four_bit(torch.float32),
        peft_config=LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as output:
        args = SFTConfig(
            output_dir=output,
            max_steps=STEPS,
            per_device_train_batch_size=SEQUENCES // _world_size(),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        args._n_gpu = min(args.n_gpu, 1)  # the plain process must not become DataParallel where there are two GPUs
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": tokens(SEQUENCES * STEPS).tolist()}),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def compile_layer(folder: str) -> Compiled:
    """Compile one QuantizedLinear; `fullgraph` raises at a graph break. Inductor on CUDA, capture alone on CPU."""
    model = load_model(folder, quantization_config=four_bit(torch.bfloat16))
    layer = next(module for module in model.modules() if isinstance(module, QuantizedLinear))
    device = PartialState().device
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    results = []
    for run in (layer, compiled):
        torch.manual_seed(0)
        value = torch.randn(64, layer.in_features, device=device, dtype=torch.bfloat16, requires_grad=True)
        output = run(value)
        output.square().mean().backward()
        assert value.grad is not None
        results.append((output, value.grad))
    (eager, eager_gradient), (output, gradient) = results
    return Compiled(relative_error(output, eager), relative_error(gradient, eager_gradient))


@contextmanager
def _mixed_precision(dtype: torch.dtype) -> Iterator[None]:
    """In one process the Trainer's bf16 is autocast; under FSDP2 the sharded model has its own policy."""
    autocast = dtype == torch.bfloat16 and not dist.is_initialized()
    with torch.autocast(PartialState().device.type, dtype=torch.bfloat16, enabled=autocast):
        yield


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a trainable parameter got no gradient"
    # A copy in any case: clipping scales gradients in place.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().cpu()


def _mean(loss: Tensor) -> float:
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
    return float(mean) / _world_size()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
