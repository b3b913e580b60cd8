"""One rank of planner_accuracy.py: load, train some steps, and say what each part took at its highest.

Three steps, or in rotary training two for each visit of a sweep from the embedding up to the head: moments exist from
the second on.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from live_tensors import live_tensors
from peft import LoraConfig
from planner_models import quantize_folder
from tiny_llama import make_tokenizer
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, HqqConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_fsdp_qlora import RotaryConfig, load_model, prepare_rotary
from hf_fsdp_qlora.distributed import rank, world_size
from hf_fsdp_qlora.memory_settings import MemorySettings
from hf_fsdp_qlora.quantization import LinearInt8Config
from hf_fsdp_qlora.rotary.prepare import Rotary

STEPS = 3
STEPS_PER_VISIT = 2


def measure(folder: str, settings: MemorySettings) -> dict[str, Any]:
    """Bytes: `loading`, `peak` of training, `parts` of a step by name, and what is allocated between steps; where
    there are several ranks also which large tensors are `alive` before the first."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as work:
        if settings.prequantized:
            quantize_folder(Path(folder), Path(work) / "nf4", double_quant=settings.double_quant)
            folder = str(Path(work) / "nf4")
        parts = Parts()
        rotary = None
        if settings.method == "rotary":
            config = rotary_config(settings)
            model: Any = load_model(folder, rotary=config)
            parts.end("loading")
            rotary = prepare_rotary(model, config)
            watch(model.model, parts)
        else:
            model = load_adapted(folder, settings)
            parts.end("loading")
            watch(model.get_base_model().model, parts, compiled=settings.compile_layers)
        make_trainer(model, settings, work, parts, rotary).train()
    highest, loading = parts.highest, parts.highest.pop("loading")
    wrapping = highest.pop("preparing")
    if settings.engine == "fsdp1":  # accelerate moves the model to the GPU there
        loading = max(loading, wrapping)
    return {
        "loading": loading, "peak": max(highest.values()), "parts": highest, "static": parts.between,
        "alive": parts.alive, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def load_adapted(folder: str, settings: MemorySettings) -> Any:
    """A model with an adapter, as the settings say."""
    return load_model(
        folder,
        quantization_config=None if settings.prequantized else quantization_config(settings),
        peft_config=LoraConfig(
            r=settings.lora_r, lora_dropout=settings.lora_dropout, target_modules=settings.target_modules,
            modules_to_save=list(settings.modules_to_save) or None, task_type="CAUSAL_LM",
        ),
        offload=None if settings.offload == "none" else settings.offload,
        compile_layers=settings.compile_layers, activation_budget=settings.activation_budget,
    )  # fmt: skip


def rotary_config(settings: MemorySettings) -> RotaryConfig:
    """The same in rotary training's words, with short visits."""
    active = 1 if settings.active_fraction is None else f"{100 * settings.active_fraction:g}%"
    return RotaryConfig(
        active=active, frozen=settings.rotary_frozen, master_dtype=settings.master_dtype,  # type: ignore[arg-type]
        order="sequential", steps_per_block=STEPS_PER_VISIT,
    )  # fmt: skip


def quantization_config(settings: MemorySettings) -> Any:
    """The config object that stands for the planner's settings."""
    if settings.method == "lora":
        return None
    if settings.quant_format == "int8":
        return LinearInt8Config(block_size=settings.row_block)
    if settings.quant_format == "hqq":
        return HqqConfig(nbits=4, group_size=settings.row_block)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=settings.quant_format,
        bnb_4bit_use_double_quant=settings.double_quant,
    )  # fmt: skip


class Parts:
    """The highest allocation of each part of a step, over all steps. Zero without CUDA."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.highest: dict[str, int] = {}
        self.between: dict[str, int] = {}
        self.alive: list[str] = []
        gc.collect()
        self._reset()

    def end(self, name: str) -> None:
        """A part ends here and the next begins."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        self.highest[name] = max(self.highest.get(name, 0), peak)
        self._reset()

    def now(self, name: str) -> None:
        """Note what is allocated at this point."""
        self.between[name] = torch.cuda.memory_allocated() if self.cuda else 0

    def _reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()


def watch(decoder: Any, parts: Parts, *, compiled: bool = False) -> None:
    """Let a model's forward and backward end parts. Recomputation runs the last layer's hook again, which only ends
    the same part earlier once more. A compiled layer has none, as it would be compiled too: its backward is part of
    the other layers'."""

    def before_norm(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        parts.end("forward")
        on_gradient(inputs[0], "norm")

    def on_gradient(tensor: Tensor, name: str) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda _: parts.end(name))

    decoder.norm.register_forward_pre_hook(before_norm)
    decoder.norm.register_forward_hook(lambda _, __, output: on_gradient(output, "head"))
    if not compiled:
        decoder.layers[-1].register_forward_pre_hook(lambda _, inputs: on_gradient(inputs[0], "last layer"))


class _Steps(TrainerCallback):
    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.parts.end("preparing")
            if world_size() > 1:
                self.parts.alive = live_tensors("cuda" if self.parts.cuda else "cpu")
        self.parts.now(f"before step {state.global_step + 1}")

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.parts.end("other layers")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.parts.end("other layers")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.parts.end("optimizer")


def make_trainer(
    model: Any, settings: MemorySettings, work: str, parts: Parts, rotary: Rotary | None = None
) -> SFTTrainer:
    """The stock trainer on random tokens; half as many in every second sequence where batches are padded."""
    cuda = torch.cuda.is_available()
    steps = STEPS if rotary is None else STEPS_PER_VISIT * len(rotary.plan.visits(rotary.plan.rotating))
    count = settings.batch_size * settings.gradient_accumulation_steps * steps * world_size()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.config.vocab_size, (count, settings.seq_len), generator=generator).tolist()
    if settings.padded:
        ids = [row[: settings.seq_len // (1 + index % 2)] for index, row in enumerate(ids)]
    args = SFTConfig(
        output_dir=f"{work}/out", max_steps=steps, logging_steps=1, save_strategy="no", report_to=[],
        per_device_train_batch_size=settings.batch_size, max_length=settings.seq_len, learning_rate=1e-4,
        gradient_accumulation_steps=settings.gradient_accumulation_steps, optim=settings.optimizer,
        gradient_checkpointing=settings.gradient_checkpointing, bf16=True, use_cpu=not cuda, disable_tqdm=True,
        dataloader_pin_memory=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # a plain process must not become DataParallel where there are two GPUs
    if rank() == 0:
        Path(args.output_dir or work).mkdir(exist_ok=True)
    callbacks: list[TrainerCallback] = [_Steps(parts)]
    return SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list([{"input_ids": row} for row in ids]),
        processing_class=make_tokenizer(), callbacks=callbacks if rotary is None else [rotary.callback, *callbacks],
        optimizer_cls_and_kwargs=None if rotary is None else rotary.optimizer(args),
    )  # fmt: skip
