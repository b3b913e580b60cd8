"""DoRA over quantised rows: the norm of every adapted weight without ever building that weight in training.

DoRA divides each output row of W + sBA by its norm and multiplies it by a trained magnitude. PEFT dequantises W and
multiplies BA out, per layer and step. Here the squared norm is expanded,

    ||W + sBA||^2 = ||W||^2 + 2s <B, W A^T> + s^2 <B, B (A A^T)>      (sums over each output row)

so that ||W||^2 is computed once after loading and W A^T is what the layer gives for r more input rows. The frozen
layer is then called once per forward, which is also what FSDP2 needs: the rows are gathered for that call only.

As in the paper (section 4.3) the norm is a constant to autograd.

Source: DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.sharding import gathered_rows, write_full_tensor

SQUARED_NORM = "base_squared_norm"


class QuantizedDora(LoraVariant):
    """What PEFT asks about DoRA while it injects a layer; the arithmetic is in `dora_forward`."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Give the layer its magnitude, (out_features,) on meta; `initialize_magnitudes` fills it."""
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        magnitude = DoraLinearLayer(fan_in_fan_out=False)
        magnitude.weight = nn.Parameter(torch.empty(module.out_features, device="meta"))
        module.lora_magnitude_vector[adapter_name] = magnitude

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Never used: `dora_forward` makes the base output itself.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a DoRA adapter over quantized rows cannot be combined with other active adapters.")


def dora_forward(layer: Any, x: Tensor, name: str) -> Tensor:
    """Output of a `QuantizedLoraLinear` with the DoRA adapter `name`: (..., in_features) -> (..., out_features).

    Dropout acts as in PEFT: on everything but the plain base output.
    """
    lora_a, lora_b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    base: QuantizedLinear = layer.get_base_layer()
    dropped = layer.lora_dropout[name](x)
    inputs = [x] if dropped is x else [x, dropped]
    rows = [tensor.flatten(0, -2) for tensor in inputs]
    out = base(torch.cat([*rows, lora_a.weight.detach().to(x.dtype)]), add_bias=False)
    *projected, weight_at = out.split([*map(len, rows), len(lora_a.weight)])
    plain, of_dropped = projected[0].view(*x.shape[:-1], -1), projected[-1].view(*x.shape[:-1], -1)

    norm = _norm(getattr(layer, SQUARED_NORM), weight_at.detach().T, lora_a.weight, lora_b.weight, scaling)
    scale = (layer.lora_magnitude_vector[name].weight / norm).to(plain.dtype)
    if not torch.is_autocast_enabled(x.device.type):
        dropped = dropped.to(lora_a.weight.dtype)
    update = (lora_b(lora_a(dropped)) * scaling).to(plain.dtype)
    result = plain + (scale - 1) * of_dropped + scale * update
    return result if base.bias is None else result + base.bias.to(result.dtype)


def initialize_magnitudes(model: nn.Module, name: str, *, keep_magnitudes: bool = False) -> None:
    """Compute what DoRA needs to know about each weight, and start the magnitudes at the norms of W + sBA.

    Collective when the model is sharded: weights are gathered a group at a time.

    Args:
        name: the adapter.
        keep_magnitudes: they were read from a saved adapter.
    """
    adapted = (layer for layer in model.modules() if isinstance(layer, LoraLinear))
    layers: list[Any] = [layer for layer in adapted if name in layer.lora_variant]
    if not layers:
        return
    over_rows = {id(layer.get_base_layer()): layer for layer in layers if _has_rows(layer)}
    for group in gathered_rows(model):
        for base in group:
            if id(base) in over_rows:
                weight = base.dequantize().float()
                over_rows[id(base)].register_buffer(SQUARED_NORM, weight.square().sum(dim=1), persistent=False)
                if not keep_magnitudes:
                    _start_magnitude(over_rows[id(base)], name, weight)
    if not keep_magnitudes:
        for layer in layers:
            if not _has_rows(layer):  # left in 16 bit
                _start_magnitude(layer, name, _whole(layer.get_base_layer().weight).float())


def _start_magnitude(layer: Any, name: str, weight: Tensor) -> None:
    lora_a, lora_b = (_whole(part[name].weight).to(weight) for part in (layer.lora_A, layer.lora_B))
    start = torch.linalg.norm(weight + layer.scaling[name] * (lora_b @ lora_a), dim=1)
    write_full_tensor(layer.lora_magnitude_vector[name].weight, start)


def _norm(squared_norm: Tensor, weight_at: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Row norms of W + sBA in float32.

    Args:
        squared_norm: (out,) row norms of W, squared.
        weight_at: (out, r), W A^T.
        lora_a: (r, in).
        lora_b: (out, r).

    Returns:
        (out,) float32, outside the graph.
    """
    with torch.no_grad(), torch.autocast(lora_a.device.type, enabled=False):
        a, b = lora_a.float(), lora_b.float()
        cross = (b * weight_at.float()).sum(dim=1)
        own = (b * (b @ (a @ a.T))).sum(dim=1)
        return (squared_norm + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()


def _has_rows(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), QuantizedLinear)


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
