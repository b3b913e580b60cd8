"""Config classes for formats that transformers has no config for, in the manner of its own."""

from __future__ import annotations

from typing import Any

from transformers import BitsAndBytesConfig


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
