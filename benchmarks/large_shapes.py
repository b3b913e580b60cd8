"""Models of 33B to 70B parameters on cards of 24 and 48 GiB: do they load, do they train, in how much memory?

    python3 benchmarks/large_shapes.py --shape llama-70b --ranks 2 --card-gib 24 --seq-len 512

Makes a random model of that shape in bitsandbytes NF4 with double quantisation, fed tensor by tensor to the package's
own quantiser (the 16-bit model never exists), and trains LoRA on all linear layers through the stock SFTTrainer.
Each rank is capped with `set_per_process_memory_fraction`, less what CUDA and NCCL take themselves (`--reserve-gib`),
so one large GPU stands in for small cards; ranks that outnumber the GPUs share one. Quantised bytes are checked
against their fingerprints before the first step and after the last. Random weights: losses only show that they are
finite and equal on all ranks.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from launch import FSDP2_ENV, describe_machine, run_ranks
from torch import Tensor

SHAPES = {
    "tiny": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4),
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8),
    "llama-33b": dict(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52),
    "llama-65b": dict(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64),
    "llama-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                      num_key_value_heads=8),
}  # fmt: skip
GIB = 2**30
STEPS = 3


def main() -> None:
    args = parse_arguments()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        started = time.perf_counter()
        write_model(folder, args.shape, args.vocab_size)
        made_s = time.perf_counter() - started
        env = FSDP2_ENV | {"FSDP_OFFLOAD_PARAMS": str(args.offload == "all").lower()}
        distributed = args.ranks > 1 or args.offload != "none"
        results = run_ranks(
            train, str(folder / "nf4"), vars(args), world_size=args.ranks,
            env=env if distributed else None, process_group=distributed,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    show(args, results, made_s)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--card-gib", type=float, default=24.0, help="memory of the card that is stood in for")
    parser.add_argument("--reserve-gib", type=float, default=0.8, help="of which CUDA and NCCL take this much")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--adapter-dtype", default="float32")
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--offload", choices=["none", "base", "all"], default="none")
    parser.add_argument("--folder", help="where the model is written for the time of the run")
    return parser.parse_args()


def write_model(folder: Path, shape: str, vocab_size: int) -> None:
    """The quantised folder `folder/nf4`, from random tensors made on the device one at a time."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    from hf_fsdp_qlora.quantize_checkpoint import quantize_checkpoint

    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=4096, **SHAPES[shape])
    (folder / "original").mkdir()
    config.save_pretrained(folder / "original")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensors() -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(0)
        for name, parameter in model.state_dict().items():
            if parameter.dim() == 1:
                yield name, torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            else:
                yield name, torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)

    quantize_checkpoint(
        folder / "original",
        folder / "nf4",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
        ),
        device=device,
        tensors=tensors(),
    )  # fmt: skip


def train(model_path: str, args: dict[str, Any]) -> dict[str, Any]:
    """One rank: load under the cap, train, and say what it took."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from hf_fsdp_qlora import load_model
    from hf_fsdp_qlora.integrity import check_integrity
    from tests.tiny_tokenizer import make_tokenizer

    cuda = torch.cuda.is_available()
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((args["card_gib"] - args["reserve_gib"]) * GIB / total)
    model = load_model(
        model_path,
        peft_config=LoraConfig(r=args["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM"),
        offload=args["offload"] if args["offload"] != "none" else None,
        adapter_dtype=getattr(torch, args["adapter_dtype"]),
    )
    loaded = _memory(cuda) | {"load_s": model.load_report.seconds, "report": model.load_report.summary()}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 259, (STEPS * args["batch_size"] * 4, args["seq_len"]), generator=generator)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=f"{model_path}-out", per_device_train_batch_size=args["batch_size"], max_steps=STEPS,
            max_length=args["seq_len"], optim=args["optim"], learning_rate=1e-4, gradient_checkpointing=True,
            bf16=cuda, use_cpu=not cuda, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    rows_checked = check_integrity(model)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    trained_s = time.perf_counter() - started
    trained = _memory(cuda)
    check_integrity(model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"loaded": loaded, "trained": trained, "train_s": trained_s, "losses": losses, "rows": rows_checked}


def _memory(cuda: bool) -> dict[str, float]:
    """GiB: peak of tensors, of the allocator's reservation, what the card has in use in all, and host memory."""
    rss = psutil.Process().memory_full_info().uss / GIB
    if not cuda:
        return {"peak": 0.0, "reserved": 0.0, "card": 0.0, "host": rss}
    free, total = torch.cuda.mem_get_info()
    peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    return {"peak": peak, "reserved": reserved, "card": (total - free) / GIB, "host": rss}


def show(args: argparse.Namespace, results: list[dict[str, Any]], made_s: float) -> None:
    """Print the table, after checking that the ranks agree."""
    assert all(result["losses"] == results[0]["losses"] for result in results), "ranks disagree about the loss"
    assert all(torch.isfinite(torch.tensor(result["losses"])).all() for result in results), "losses are not finite"
    print(describe_machine())
    print(
        f"{args.shape}, vocabulary {args.vocab_size}, {args.ranks} rank(s) of {args.card_gib:g} GiB "
        f"({args.reserve_gib:g} GiB kept for CUDA and NCCL), sequence {args.seq_len}, batch {args.batch_size}, "
        f"LoRA r={args.lora_r} {args.adapter_dtype}, {args.optim}, offload {args.offload}; "
        f"model made in {made_s:.0f} s"
    )
    print("| rank | load s | peak loading GiB | peak training GiB | reserved GiB | host GiB | s per step | losses |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for rank, result in enumerate(results):
        loaded, trained = result["loaded"], result["trained"]
        print(
            f"| {rank} | {loaded['load_s']:.1f} | {loaded['peak']:.2f} | {trained['peak']:.2f} | "
            f"{trained['reserved']:.2f} | {trained['host']:.2f} | {result['train_s'] / STEPS:.2f} | "
            f"{', '.join(f'{loss:.4f}' for loss in result['losses'])} |"
        )
    print(f"card in use after training, all ranks on it: {results[0]['trained']['card']:.2f} GiB")
    print(f"{results[0]['rows']} rows byte-equal before and after training. {results[0]['loaded']['report']}")


if __name__ == "__main__":
    main()
