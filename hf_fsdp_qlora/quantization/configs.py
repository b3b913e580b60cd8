"""Config classes for formats that transformers has no config for, in the manner of its own."""

from __future__ import annotations

from typing import Any

from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin


class BlockwiseFourBitConfig(BitsAndBytesConfig):
    """`BitsAndBytesConfig(load_in_4bit=True, ...)` with another block size.

    Args:
        bnb_4bit_blocksize: weights under one absmax: 32, 64 (what `BitsAndBytesConfig` always uses), 128, 256, 512,
            1024, 2048 or 4096. Larger blocks cost fewer bytes and more error.
        **kwargs: everything `BitsAndBytesConfig` takes.
    """

    def __init__(self, bnb_4bit_blocksize: int = 64, **kwargs: Any) -> None:
        kwargs.setdefault("load_in_4bit", True)
        super().__init__(**kwargs)
        self.bnb_4bit_blocksize = bnb_4bit_blocksize


class DenseConfig(QuantizationConfigMixin):
    """No quantisation: weights in the model's dtype, in rows, so that they are sharded as quantised ones are.

    Args:
        modules_to_not_convert: linear layers to leave alone; None means the head.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None) -> None:
        self.quant_method = "dense"  # type: ignore[assignment]  # transformers' enum has no such member
        self.modules_to_not_convert = modules_to_not_convert


class _Int8Config(QuantizationConfigMixin):
    def __init__(self, quant_method: str, block_size: int, modules_to_not_convert: list[str] | None) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' enum has no such member
        self.block_size = block_size
        self.modules_to_not_convert = modules_to_not_convert


class DynamicInt8Config(_Int8Config):
    """bitsandbytes' blockwise 8-bit floats: a table of 256 values, finer towards zero, times the block's absmax.

    Args:
        block_size: weights under one absmax: 64, 128, 256, 512, 1024, 2048 or 4096.
        modules_to_not_convert: linear layers to leave alone; None means the head.
    """

    def __init__(self, block_size: int = 128, modules_to_not_convert: list[str] | None = None) -> None:
        super().__init__("bitsandbytes_dynamic_int8", block_size, modules_to_not_convert)


class LinearInt8Config(_Int8Config):
    """Symmetric 8-bit integers, -127 to 127, times a float32 scale per block.

    On normally distributed weights its error is 0.65 %, where that of `DynamicInt8Config` is 1.02 % (blocks of 128).

    Args:
        block_size: weights under one scale, any positive number.
        modules_to_not_convert: linear layers to leave alone; None means the head.
    """

    def __init__(self, block_size: int = 128, modules_to_not_convert: list[str] | None = None) -> None:
        super().__init__("linear_int8", block_size, modules_to_not_convert)
