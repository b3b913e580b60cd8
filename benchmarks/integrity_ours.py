"""This package under the check of byte_integrity.py: what is gathered, in every phase of training, byte for byte.

References are bitsandbytes on whole tensors on the same device, and the stock 4-bit model for logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from bitsandbytes import functional as bnb
from integrity_stock import ByteCheck
from peft import LoraConfig, PeftModel
from tiny_llama import four_bit, linear_weights, relative_error, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_fsdp_qlora import QuantizedLinear, load_model
from hf_fsdp_qlora.integrity import check_integrity
from hf_fsdp_qlora.sharding import gathered_rows

OFFLOADS = ("none", "base", "all")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Expected:
    """One layer as unsharded bitsandbytes has it: the bytes of codes and statistics in this package's row order (no
    padding), and the weight they stand for."""

    pieces: tuple[Tensor, ...]
    weight: Tensor


def check_ours(folder: str) -> dict[str, list[ByteCheck]]:
    """For each kind of offload: the checks, in order. Raises where this package's own integrity check does."""
    device = PartialState().device
    expected = {name: expect(weight.to(device)) for name, weight in linear_weights(folder).items()}
    reference = stock_logits(folder)
    return {offload: list(check_offload(folder, offload, expected, reference)) for offload in OFFLOADS}


def check_offload(folder: str, offload: str, expected: dict[str, Expected], reference: Tensor) -> Iterator[ByteCheck]:
    """Load and train a step, and look before, during and after."""
    model = load_model(
        folder,
        quantization_config=four_bit(DTYPE),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        dtype=DTYPE,
        offload=offload,
    )
    modules = {plain_name(name): module for name, module in model.named_modules()}
    layers = {name: module for name, module in modules.items() if isinstance(module, QuantizedLinear)}
    assert layers.keys() == expected.keys(), "the package and the benchmark disagree about what is quantised"
    inputs = tokens().to(PartialState().device)
    with torch.no_grad():
        logits = model(input_ids=inputs, use_cache=False).logits
    yield look(model, layers, expected, "loaded", relative_error(logits, reference))

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    mine = inputs[dist.get_rank() :: dist.get_world_size()]
    with watched(layers, expected) as counts:
        model(input_ids=mine, labels=mine, use_cache=False).loss.backward()
    compared, differing = counts
    assert compared >= 2 * row_bytes(expected), "the rows were not seen in forward and in its recomputation"
    yield ByteCheck("in forward and recompute", compared, differing, 0.0)
    optimizer.step()
    yield look(model, layers, expected, "after the step")


def look(
    model: PeftModel,
    layers: dict[str, QuantizedLinear],
    expected: dict[str, Expected],
    when: str,
    logit_error: float | None = None,
) -> ByteCheck:
    """Gather every group as training does and compare; compare `dequantize()`; run the package's own check."""
    compared = differing = 0
    names = {id(layer): name for name, layer in layers.items()}
    for group in gathered_rows(model):
        for layer in group:
            wrong, total = count_differing(layer, expected[names[id(layer)]])
            compared, differing = compared + total, differing + int(wrong)
    error = max(relative_error(layer.dequantize(), expected[name].weight) for name, layer in layers.items())
    check_integrity(model)
    return ByteCheck(when, compared, differing, error, logit_error)


@contextmanager
def watched(layers: dict[str, QuantizedLinear], expected: dict[str, Expected]) -> Iterator[list[int]]:
    """Compare rows whenever a layer runs, recomputation included; the list holds [compared, differing] at the end."""
    counts = [0, 0]
    found: list[Tensor] = []  # read after the block: the comparison must not wait for the GPU in mid-training

    def compare(layer: nn.Module, _: Any, wanted: Expected) -> None:
        wrong, total = count_differing(layer, wanted)  # type: ignore[arg-type]
        counts[0] += total
        found.append(wrong)

    handles = [
        layer.register_forward_pre_hook(lambda module, args, wanted=expected[name]: compare(module, args, wanted))
        for name, layer in layers.items()
    ]
    try:
        yield counts
        counts[1] = int(torch.stack(found).sum())
    finally:
        for handle in handles:
            handle.remove()


def count_differing(layer: QuantizedLinear, expected: Expected) -> tuple[Tensor, int]:
    """Bytes that differ, as a tensor on the device, and bytes compared; the layer's rows are whole."""
    codes = layer.weight.detach().view(torch.uint8)
    stats = layer.weight_stats.detach().view(torch.uint8)
    blocks = stats.shape[1] - 8
    rows = (codes, stats[:, :blocks], stats[:, blocks : blocks + 4], stats[:, blocks + 4 :])
    wrong = torch.zeros((), dtype=torch.int64, device=codes.device)
    for have, want in zip(rows, expected.pieces, strict=True):
        wrong = wrong + (have.flatten()[: want.numel()] != want).sum()
    return wrong, sum(want.numel() for want in expected.pieces)


def expect(weight: Tensor) -> Expected:
    """Codes, absmax codes, second-level absmax and offset (once per row), from bitsandbytes on the whole tensor."""
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    second = state.state2.absmax
    parts = (codes, state.absmax, second, state.offset.repeat(len(second)))
    pieces = tuple(part.contiguous().view(torch.uint8).flatten() for part in parts)
    return Expected(pieces, bnb.dequantize_4bit(codes, state))


def stock_logits(folder: str) -> Tensor:
    """Logits of the stock 4-bit model, unsharded, in bf16."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bit(DTYPE), dtype=DTYPE, device_map={"": PartialState().device}
    )
    model.train()  # no dropout; in eval mode bitsandbytes' CPU layers use a kernel that rounds differently
    with torch.no_grad():
        return model(input_ids=tokens().to(PartialState().device), use_cache=False).logits


def plain_name(name: str) -> str:
    """A layer's name in the checkpoint, from its name under PEFT."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def row_bytes(expected: dict[str, Expected]) -> int:
    return sum(piece.numel() for layer in expected.values() for piece in layer.pieces)
