"""Every backend configuration that the suite runs over, each with its trusted reference.

Add a backend here and nowhere else: `test_rows.py` runs on one process, `test_sharded.py` on several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor
from transformers import BitsAndBytesConfig, HqqConfig

from hf_fsdp_qlora.quantization import DenseConfig, DynamicInt8Config, LinearInt8Config
from tests.conformance import toy_backend

NEEDS_HQQ = pytest.mark.skipif(find_spec("hqq") is None, reason="hqq is not installed (the extra hf_fsdp_qlora[hqq])")


@dataclass(frozen=True)
class Case:
    """One configuration of a backend.

    Args:
        quant_method: the key of the backend in the registry.
        make_config: what a user would pass to `load_model`.
        reference: (out_features, in_features) -> the same, through the backend's own library or plain torch, without
            any code of this package. In the dtype of the weight.
        marks: pytest's.
        group_size: of formats whose rows hold columns of the flattened weight seen as a (group_size, n) matrix; None
            where they hold runs of it.
    """

    quant_method: str
    make_config: Callable[[], Any]
    reference: Callable[[Tensor], Tensor]
    marks: tuple[pytest.MarkDecorator, ...] = ()
    group_size: int | None = None

    def in_rows(self, flat: Tensor, first: int, stop: int) -> Tensor:
        """The weights, flattened, of the rows that hold weights `first` to `stop`."""
        if self.group_size is None:
            return flat[first:stop]
        columns = flat.view(self.group_size, -1)
        return columns[:, first // self.group_size : stop // self.group_size].flatten()


def four_bit(quant_type: str, nested: bool) -> Case:
    def reference(weight: Tensor) -> Tensor:
        codes, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
        return bnb.dequantize_4bit(codes, state).reshape(weight.shape)

    settings = dict(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested)
    return Case("bitsandbytes", lambda: BitsAndBytesConfig(**settings), reference)


def dynamic_int8(weight: Tensor) -> Tensor:
    return bnb.dequantize_blockwise(*bnb.quantize_blockwise(weight, blocksize=128))


def linear_int8(weight: Tensor) -> Tensor:
    blocks = torch.cat([weight.flatten().float(), torch.zeros(-weight.numel() % 128).to(weight.device)]).view(-1, 128)
    scales = blocks.abs().max(dim=1, keepdim=True).values * (1 / 127)
    codes = torch.round(blocks / scales)
    return (codes * scales).flatten()[: weight.numel()].view(weight.shape).to(weight.dtype)


def hqq(nbits: int, axis: int = 1) -> Case:
    def reference(weight: Tensor) -> Tensor:
        from hqq.core.quantize import HQQLinear

        settings = HqqConfig(nbits=nbits, group_size=64, axis=axis).quant_config
        layer = HQQLinear.from_weights(weight.clone(), None, settings, weight.dtype, device=str(weight.device))
        return layer.dequantize()

    make_config = lambda: HqqConfig(nbits=nbits, group_size=64, axis=axis)  # noqa: E731  (as short as the others)
    return Case("hqq", make_config, reference, (NEEDS_HQQ,), group_size=64 if axis == 0 else None)


def sign(weight: Tensor) -> Tensor:
    parts = weight.flatten().float().split(toy_backend.ROW_SIZE)
    signs = [torch.where(part >= 0, 0.5, -0.5) * part.abs().max() for part in parts]
    return torch.cat(signs).view(weight.shape).to(weight.dtype)


CASES: dict[str, Case] = {
    "nf4": four_bit("nf4", nested=False),
    "nf4 nested": four_bit("nf4", nested=True),
    "fp4": four_bit("fp4", nested=False),
    "fp4 nested": four_bit("fp4", nested=True),
    "dynamic int8": Case("bitsandbytes_dynamic_int8", DynamicInt8Config, dynamic_int8),
    "linear int8": Case("linear_int8", LinearInt8Config, linear_int8),
    "dense": Case("dense", DenseConfig, lambda weight: weight),
    "hqq 8": hqq(8),
    "hqq 4": hqq(4),
    "hqq 3": hqq(3),
    "hqq 2": hqq(2),
    "hqq 4, axis 0": hqq(4, axis=0),
    "hqq 3, axis 0": hqq(3, axis=0),
    "toy": Case("toy_sign", toy_backend.SignConfig, sign),
}
EVERY_CASE = pytest.mark.parametrize("name", [pytest.param(name, marks=case.marks) for name, case in CASES.items()])
