"""What one QLoRA linear layer costs on a GPU, part by part, against what the chip can do.

    python3 benchmarks/kernel_speed.py [--tokens 2048 8192]

For every linear shape of an 8B Llama: dequantising by our kernel and by bitsandbytes (NF4, double quantisation, bf16;
compared bit for bit before a time is printed), the dense product, and the products that LoRA adds. Medians of device
time; the weights rotate through enough copies that the cache does not hold them. "whole" is a layer's forward and
backward as training calls it, by the clock: where it is above the sum of its parts, launching them is what costs.
"host" is that cost, call by call: microseconds until a call returns, on sizes that keep no GPU busy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from launch import describe_machine
from torch import Tensor, nn

from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.quantization import backend_for_config
from hf_fsdp_qlora.quantization.bitsandbytes import FourBitBackend

SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
LORA_R = 16
COPIES = 4
REPEATS = 30
HOST_CALLS = 200


def main() -> None:
    args = parse_arguments()
    print(describe_machine())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    show_ceilings(device)
    show_host_times(torch.device(device))
    columns = (
        "shape", "dequantise ms (TB/s)", "bitsandbytes ms", "tokens", "product ms (TFLOP/s)", "x A ms",
        "B after the product ms", "B before it ms", "product onto B ms", "grad x ms", "grad A ms", "grad B ms",
        "whole forward ms", "whole backward ms",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, shape in SHAPES.items():
        if device == "cpu":
            shape = (shape[0] // 64, shape[1] // 64)
        measure(name, shape, args.tokens if device == "cuda" else [8], torch.device(device))


def show_ceilings(device: str) -> None:
    """What a large product and a large copy reach here."""
    side = 8192 if device == "cuda" else 256
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**28 if device == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    flops = 2 * side**3 / milliseconds(lambda: a @ b) / 1e9
    copied = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e9
    print(f"ceilings: {flops:.0f} TFLOP/s in a product of {side}, {copied:.2f} TB/s copying")


def show_host_times(device: torch.device) -> None:
    """What calls cost the host, ours beside the parts they are made of."""
    backend: Any = four_bit_backend()
    shape = (256, 256)
    layer = random_layer(backend, shape, device)
    x = torch.randn(16, shape[1], device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(16, shape[0], device=device, dtype=torch.bfloat16)
    lora_a, lora_b = (torch.randn(size, device=device, requires_grad=True) for size in [(LORA_R, 256), (256, LORA_R)])
    narrow = lora_a.detach().bfloat16()
    lora = (lora_a, lora_b, 1.0)
    outputs: list[Tensor] = []
    calls: dict[str, Callable[[], Any]] = {
        "view": lambda: x.view(-1),
        "empty": lambda: torch.empty(shape, device=device, dtype=torch.bfloat16),
        "cast": lambda: lora_a.detach().to(torch.bfloat16),
        "product": lambda: nn.functional.linear(x.detach(), narrow),
        "dequantise": lambda: backend.dequantize(layer.weight, layer.weight_stats, shape),
        "bitsandbytes": lambda: backend.reference_dequantize(layer.weight, layer.weight_stats, shape),
        "layer": lambda: layer(x),
        "layer with LoRA": lambda: outputs.append(layer(x, lora=lora)),
        "its backward": lambda: outputs.pop().backward(grad),
    }
    found = {name: host_us(call) for name, call in calls.items()}
    print("host us: " + ", ".join(f"{name} {us:.1f}" for name, us in found.items()), flush=True)


def host_us(call: Callable[[], Any]) -> float:
    """Median over a few rounds of the mean of calls in a row, until the last has returned."""
    rounds = []
    for _ in range(5):
        _synchronize()
        started = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        rounds.append((time.perf_counter() - started) / HOST_CALLS * 1e6)
    return statistics.median(rounds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    return parser.parse_args()


def measure(name: str, shape: tuple[int, int], token_counts: list[int], device: torch.device) -> None:
    """Print the rows of one shape."""
    backend = four_bit_backend()
    layers = cycle([random_layer(backend, shape, device) for _ in range(COPIES)])
    layer = next(layers)
    dense = layer.dequantize()
    assert torch.equal(dense, backend.reference_dequantize(layer.weight, layer.weight_stats, shape)), "bits differ"
    ours_ms = milliseconds(lambda: next(layers).dequantize())
    reference_ms = milliseconds(
        lambda: backend.reference_dequantize((each := next(layers)).weight, each.weight_stats, shape)
    )
    moved = dense.nbytes + layer.weight.nbytes + layer.weight_stats.nbytes
    for tokens in token_counts:
        x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
        grad = torch.randn(tokens, shape[0], device=device, dtype=torch.bfloat16)
        lora_a = torch.randn(LORA_R, shape[1], device=device, dtype=torch.bfloat16)
        lora_b = torch.randn(shape[0], LORA_R, device=device, dtype=torch.bfloat16)
        at_a, output = x @ lora_a.t(), x @ dense.t()
        product_ms = milliseconds(lambda x=x: x @ dense.t())
        parts = [
            milliseconds(lambda x=x, a=lora_a: x @ a.t()),
            milliseconds(lambda o=output, xa=at_a, b=lora_b: o.addmm_(xa, b.t(), alpha=0.5)),
            milliseconds(lambda xa=at_a, b=lora_b: xa @ b.t()),
            milliseconds(lambda o=output, x=x: o.addmm_(x, dense.t(), beta=0.5)),
            milliseconds(lambda g=grad: g @ dense),
            milliseconds(lambda xa=at_a, x=x: xa.t() @ x),
            milliseconds(lambda g=grad, xa=at_a: g.t() @ xa),
        ]
        forward_ms, backward_ms = whole(layers, x, grad, lora_a.float(), lora_b.float())
        rate = 2 * tokens * shape[0] * shape[1] / product_ms / 1e9
        print(
            f"| {name} {shape[0]}x{shape[1]} | {ours_ms:.4f} ({moved / ours_ms / 1e9:.2f}) | {reference_ms:.4f} | "
            f"{tokens} | {product_ms:.3f} ({rate:.0f}) | " + " | ".join(f"{part:.4f}" for part in parts)
            + f" | {forward_ms:.3f} | {backward_ms:.3f} |", flush=True,
        )  # fmt: skip


def four_bit_backend() -> FourBitBackend:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    backend: Any = backend_for_config(config, torch.bfloat16)
    assert isinstance(backend, FourBitBackend)
    return backend


def random_layer(backend: FourBitBackend, shape: tuple[int, int], device: torch.device) -> QuantizedLinear:
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
    codes, stats = backend.quantize(weight.flatten(), weight.numel(), lambda rows: rows)
    layer = QuantizedLinear(shape[1], shape[0], bias=False, backend=backend)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight_stats = nn.Parameter(stats, requires_grad=False)
    return layer


def milliseconds(action: Callable[[], Any]) -> float:
    """Median of device time; on the CPU of the clock."""
    for _ in range(3):
        action()
    if not torch.cuda.is_available():
        started = time.perf_counter()
        action()
        return (time.perf_counter() - started) * 1e3
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for begin, end in events:
        torch.cuda._sleep(200_000)  # the GPU waits while the launches queue, so that gaps are not measured
        begin.record()
        action()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def whole(layers: Any, x: Tensor, grad: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[float, float]:
    """Milliseconds by the clock of a forward and of a backward, each over many calls in a row."""
    x, lora_a, lora_b = (tensor.detach().requires_grad_() for tensor in (x, lora_a, lora_b))
    forwards, backwards = [], []
    for _ in range(5):
        _synchronize()
        started = time.perf_counter()
        with torch.autocast(x.device.type, torch.bfloat16):
            outputs = [next(layers)(x, lora=(lora_a, lora_b, 0.5)) for _ in range(8)]
        _synchronize()
        between = time.perf_counter()
        for output in outputs:
            output.backward(grad)
        _synchronize()
        forwards.append(between - started)
        backwards.append(time.perf_counter() - between)
    return statistics.median(forwards) / 8 * 1e3, statistics.median(backwards) / 8 * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
