"""The planner's predictions against what a GPU allocates.

    python benchmarks/planner_accuracy.py                 # one CUDA device; about two minutes and 20 GB of disk
    python benchmarks/planner_accuracy.py --smoke         # tiny models, runs on a CPU, measures nothing there
    python benchmarks/planner_accuracy.py --only 8b_b1 8b_b4

Every run writes a random checkpoint, loads it with `load_model` (FSDP2 runs with one rank), takes three optimizer
steps through TRL's fused head as SFTTrainer does, and compares `max_memory_allocated` with `estimate_memory`, for the
steps and for loading. Prints a Markdown table; a line that is off by more than 5 % is marked.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from trl.trainer.utils import add_fused_lm_head

from hf_fsdp_qlora import load_model
from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.model_shape import model_shape
from hf_fsdp_qlora.safetensors_stream import SafetensorsWriter, TensorInfo

GIB = 2**30
STEPS = 3
PIECE = 2**24  # elements of random values that every tensor repeats
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "70b_8_layers": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=8, num_attention_heads=64,
                         num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One line of the table: a size, and the planner's settings that differ from its defaults."""

    size: str
    settings: dict[str, Any] = field(default_factory=dict)


RUNS = {
    "8b_b1": Run("8b", dict(engine="none")),
    "8b_b4": Run("8b", dict(engine="none", batch_size=4)),
    "8b_r64_plain_absmax": Run("8b", dict(engine="none", lora_r=64, double_quant=False)),
    "8b_stored": Run("8b", dict(engine="none", seq_len=512, gradient_checkpointing=False)),
    "8b_dropout_accumulate": Run("8b", dict(engine="none", lora_dropout=0.05, gradient_accumulation_steps=2)),
    "8b_fsdp2": Run("8b", dict(engine="fsdp2")),
    "8b_fsdp2_offload": Run("8b", dict(engine="fsdp2", offload="all")),
    "8b_fsdp2_offload_base": Run("8b", dict(engine="fsdp2", offload="base")),
    "1b_long": Run("1b", dict(engine="none", seq_len=8192)),
    "1b_head": Run("1b", dict(engine="none", modules_to_save=("lm_head",))),
    "70b_8_layers": Run("70b_8_layers", dict(engine="none", seq_len=1024)),
    "70b_8_layers_fsdp2": Run("70b_8_layers", dict(engine="fsdp2", seq_len=4096)),
}
SMOKE = {
    "tiny": Run("tiny", dict(engine="none", seq_len=64)),
    "tiny_fsdp2": Run("tiny", dict(engine="fsdp2", seq_len=64, gradient_accumulation_steps=2)),
}


def main(args: argparse.Namespace) -> None:
    runs = SMOKE if args.smoke else {name: RUNS[name] for name in args.only or RUNS}
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
    os.environ.setdefault("MASTER_PORT", "29511")
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    print("| run | peak predicted | measured | off | loading predicted | measured | off |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, run in runs.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            config = write_checkpoint(Path(folder), run.size)
            estimate = estimate_memory(model_shape(config), **run.settings)
            loading, peak = measure(folder, estimate.settings)
        cells = [*compare(estimate.peak_bytes, peak), *compare(estimate.loading_peak_bytes, loading)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    torch.distributed.destroy_process_group()


def compare(predicted: int, measured: int | None) -> list[str]:
    """Three cells: predicted, measured, how far off."""
    if measured is None:
        return [f"{predicted / GIB:.2f} GiB", "no GPU", ""]
    off = predicted / measured - 1
    mark = " MISS" if abs(off) > 0.05 else ""
    return [f"{predicted / GIB:.2f} GiB", f"{measured / GIB:.2f} GiB", f"{off:+.1%}{mark}"]


def write_checkpoint(folder: Path, size: str) -> LlamaConfig:
    """A random bf16 checkpoint, written tensor by tensor."""
    sizes: dict[str, Any] = dict(SIZES[size])
    config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16", max_position_embeddings=8192)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    infos = {name: TensorInfo(torch.bfloat16, tuple(t.shape)) for name, t in model.state_dict().items()}
    values = (torch.randn(PIECE) * 0.02).bfloat16().view(torch.uint8).numpy().data
    with SafetensorsWriter(folder / "model.safetensors", infos, {"format": "pt"}) as writer:
        for info in infos.values():
            for start in range(0, info.num_bytes, len(values)):
                writer.append_bytes(values[: info.num_bytes - start])
    return config


def measure(folder: str, settings: Any) -> tuple[int | None, int | None]:
    """Highest allocated bytes while loading and while training; None without CUDA."""
    gc.collect()
    reset_peak()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=settings.double_quant
    )
    lora = LoraConfig(
        r=settings.lora_r, lora_dropout=settings.lora_dropout, target_modules=settings.target_modules,
        modules_to_save=list(settings.modules_to_save) or None, task_type="CAUSAL_LM",
    )  # fmt: skip
    model: Any = load_model(
        folder, quantization_config=quantization, peft_config=lora, fsdp=settings.engine, offload=settings.offload
    )
    loading = reset_peak()
    add_fused_lm_head(model.get_base_model())
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda" and settings.offload != "all")
    tokens = torch.randint(0, model.config.vocab_size, (settings.batch_size, settings.seq_len), device=device)
    autocast = settings.engine == "none"  # accelerate adds none under FSDP2
    for _ in range(STEPS):
        for _ in range(settings.gradient_accumulation_steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = model(input_ids=tokens, labels=tokens, fused_lm_head=True).loss
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    peak = reset_peak()
    del model, optimizer, trained
    return loading, peak


def reset_peak() -> int | None:
    """The highest allocation since the last call."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), help="some of the runs")
    parser.add_argument("--folder", help="where to write the temporary checkpoints")
    main(parser.parse_args())
