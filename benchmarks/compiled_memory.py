"""What compiled decoder layers keep and need, by torch's compiler, beside the planner. On the CPU, no layer is run.

    PYTHONPATH=. python benchmarks/compiled_memory.py                            (5 s per shape and budget)
    PYTHONPATH=. python benchmarks/compiled_memory.py --shapes 8b --budgets 0.4 --batch 4

A decoder layer is traced and compiled, with inductor's rules for GPUs where they decide about tensors (a sum after a
product is not fused into it if a pointwise kernel can add it). The code that inductor writes for backward says when
each buffer is allocated and freed: it is executed with tensors on the meta device and kernels that do nothing, and
living bytes are added up. So the peak is the wrapper's; what a kernel allocates by itself is not in it, except the
dequantised weight and, in the backward of attention, float32 sums and keys and values as wide as queries.

Prints MiB per layer: kept beside the layer's input (the partitioner's choice, the planner), and the peak of its
backward, with its input and the gradient that comes in (inductor's code, the planner). Exit status 1 if the planner is
more than 1 % below a figure.
"""

from __future__ import annotations

import argparse
import re
import weakref
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.fx_passes import post_grad
from torch._inductor.graph import GraphLowering
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from hf_fsdp_qlora.lora import add_adapter
from hf_fsdp_qlora.memory_compiled import compiled_backward_bytes, compiled_layer_bytes
from hf_fsdp_qlora.memory_settings import MemorySettings
from hf_fsdp_qlora.memory_step import step_settings
from hf_fsdp_qlora.model_shape import model_shape
from hf_fsdp_qlora.quantization import backend_for_config
from hf_fsdp_qlora.skeleton import decoder_layers, replace_linears

SHAPES: dict[str, dict[str, int]] = {
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8),
    "3b": dict(hidden_size=3072, intermediate_size=8192, num_attention_heads=24, num_key_value_heads=8),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8),
    "70b": dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8),
}
MIB = 2**20
TOLERANCE = 0.01


def main(args: argparse.Namespace) -> int:
    print("| shape | budget | batch | kept: compiler | planner | off | peak: compiler | planner | off |")
    print(f"|{' --- |' * 9}")
    missed = False
    for name in args.shapes:
        config: Any = LlamaConfig(
            **SHAPES[name], num_hidden_layers=1, vocab_size=256, max_position_embeddings=args.seq_len
        )
        settings = MemorySettings(
            engine="none", method="lora" if args.dense else "qlora", batch_size=args.batch, seq_len=args.seq_len,
            padded=args.padded,
        )  # fmt: skip
        shape = model_shape(config)
        step = step_settings(shape, settings)
        for budget in args.budgets:
            kept, peak = compiled_bytes(config, settings, budget)
            cells = compare(kept, compiled_layer_bytes(shape, step, budget))
            cells += compare(peak, compiled_backward_bytes(shape, step, budget))
            missed |= any("BELOW" in cell for cell in cells)
            print(f"| {name} | {budget:g} | {args.batch} | {' | '.join(cells)} |", flush=True)
    return int(missed)


def compare(compiler: int, planner: int) -> list[str]:
    """Three cells: the compiler's bytes, the planner's, how far off."""
    off = planner / compiler - 1 if compiler else 0.0
    mark = " BELOW" if off < -TOLERANCE else ""
    return [f"{compiler / MIB:.1f}", f"{planner / MIB:.1f}", f"{off:+.1%}{mark}"]


def compiled_bytes(config: Any, settings: MemorySettings, budget: float) -> tuple[int, int]:
    """What a layer keeps beside its input, and the peak of its backward with its input and its gradient."""
    model, layer = one_layer(config, quantized=settings.method == "qlora")
    living = Living()
    given = run_wrapper(backward_source(model, layer, settings, budget), living)
    flow = 2 * settings.batch_size * settings.seq_len * config.hidden_size
    # Cosines and sines, and a mask of booleans, are there once for all layers.
    shared = 2 * 2 * settings.seq_len * config.head_dim
    shared += settings.batch_size * settings.seq_len**2 if settings.padded else 0
    return given - 2 * flow - shared, living.peak - shared


def one_layer(config: Any, *, quantized: bool) -> tuple[Any, torch.nn.Module]:
    """A model with adapters, its memory never written, and its first decoder layer."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if quantized:
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        replace_linears(
            model, backend_for_config(nf4, torch.bfloat16), skip_modules=None, storage_dtype=torch.uint8
        )  # fmt: skip
    adapted: Any = add_adapter(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    adapted.to_empty(device="cpu")
    adapted.enable_input_require_grads()
    adapted.train()
    return adapted, decoder_layers(adapted.get_base_model())[0]


class _Compiled(Exception):  # noqa: N818 (no error: there is nothing to run)
    pass


def backward_source(model: Any, layer: torch.nn.Module, settings: MemorySettings, budget: float) -> str:
    """The Python that inductor writes for the layer's backward."""
    sources: list[str] = []
    inductor: Any = torch._dynamo.lookup_backend("inductor")  # type: ignore[attr-defined]

    def compile_only(graph: Any, inputs: Any) -> Any:
        functorch = dict(
            activation_memory_budget=budget, force_non_lazy_backward_lowering=True, enable_autograd_cache=False
        )
        with functorch_config.patch(**functorch), inductor_config.patch(force_disable_caches=True):
            inductor(graph, inputs)
        raise _Compiled

    torch._dynamo.reset()
    GraphLowering.save_output_code = staticmethod(sources.append)  # type: ignore[method-assign]
    AsyncCompile.cpp_pybinding = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    post_grad.is_gpu = lambda _: True
    layer.compile(backend=compile_only)
    mask = torch.ones(settings.batch_size, settings.seq_len, dtype=torch.long)
    if settings.padded:
        mask[:, settings.seq_len // 2 :] = 0
    try:
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=torch.zeros_like(mask), attention_mask=mask, use_cache=False)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _Compiled):
            raise
    _, backward = sources
    return backward


class Living:
    """Bytes of storages that were seen and live, the most at one time; the allocator's blocks are of 512."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: set[int] = set()

    def see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            size = -(-storage.nbytes() // 512) * 512
            self._known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, storage._cdata, size)
        return tensor

    def _release(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


class _Nothing:
    """Kernels that write into buffers they are given."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def run_wrapper(source: str, living: Living) -> int:
    """Execute the wrapper on the meta device.

    Returns:
        Bytes of what it is given beside parameters: the layer's input, what was kept, the gradient that comes in.
    """

    def empty(shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return living.see(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))

    def like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return living.see(torch.empty_like(tensor, dtype=dtype))

    def attention(query: Tensor, *_: Any, **__: Any) -> list[Tensor]:
        return [like(query), like(query[..., 0], torch.float32)]

    def attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> list[Tensor]:
        sums = [like(query, torch.float32)] + [like(query) for _ in range(2 * (key.shape[1] != query.shape[1]))]
        gradients = [like(query), like(key), like(value)]
        del sums
        return gradients

    stand_ins = dict(
        extern_kernels=_Nothing(), empty_strided_cpu=empty,
        _attention=attention, _attention_backward=attention_backward,
        reinterpret_tensor=lambda tensor, shape, stride, offset: tensor.as_strided(
            shape, stride, tensor.storage_offset() + offset
        ),
        _dequantize=lambda codes, stats, spec, rows, columns, *_: empty((rows, columns), (columns, 1), torch.bfloat16),
        _kernel=lambda *_: None,
    )  # fmt: skip
    body = re.sub(r"torch\.ops\.hf_fsdp_qlora\.dequantize\.default\(", "_dequantize(", source)
    name = r"torch\.ops\.aten\._scaled_dot_product_flash_attention_for_cpu"
    body = re.sub(name + r"_backward\.default\(", "_attention_backward(", body)
    body = re.sub(name + r"\.default\(", "_attention(", body)
    body = re.sub(r"\bcpp_fused_\w+\(", "_kernel(", body)
    body = re.sub(r"^ *assert_(size_stride|alignment)\(.*$", "", body, flags=re.MULTILINE)
    call = body[body.index("    def call(self, args):") : body.index("\nrunner = ")]
    inputs = body[body.index("def get_args():") : body.index("def benchmark_compiled_module")]
    stand_ins["rand_strided"] = lambda shape, stride, device, dtype: torch.empty_strided(
        shape, stride, dtype=dtype, device="meta"
    )
    namespace: dict[str, Any] = {"torch": torch, **stand_ins}
    inputs = inputs.replace("from torch._dynamo.testing import rand_strided", "")
    exec(compile(f"class Runner:\n{call}\n{inputs}", "wrapper", "exec"), namespace)  # noqa: S102 (inductor's code)
    arguments = namespace["get_args"]()
    names = re.findall(r"\w+", call[: call.index(" = args\n")].splitlines()[-1])
    for name, tensor in zip(names, arguments, strict=True):
        if not name.startswith("primals_") or tensor.dim() > 2:  # parameters are matrices and vectors
            living.see(tensor)
    del tensor
    given = living.now
    namespace["Runner"]().call(arguments)
    return given


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["1b", "8b"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.0, 0.4, 0.7, 1.0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--padded", action="store_true", help="attention gets a mask")
    parser.add_argument("--dense", action="store_true", help="16-bit weights in place of NF4")
    raise SystemExit(main(parser.parse_args()))
