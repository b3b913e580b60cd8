"""What the parts of byte_integrity.py share: a random checkpoint, tokens, settings, and how errors are counted."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
SEQUENCES = 8
SEQUENCE_TOKENS = 64

CONFIG = dict(
    vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1392, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
"""The MLP weights end in the middle of a row; 4 layers are enough for FSDP2 to prefetch one while another runs."""


SMALL = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=3)
"""For benchmarks that look at many settings; the MLP weights end in the middle of a row here too."""


def save_tiny_llama(folder: Path, **config: int) -> None:
    """A random bf16 Llama. Its 4-bit codes are random bytes, so 0.4 % of their pairs are NaN patterns of bf16.

    Args:
        config: over CONFIG, such as SMALL.
    """
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**CONFIG, **config})).to(torch.bfloat16).save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word per token id; trainers want a tokenizer, even for data that is tokenised."""
    words = {f"<{index}>": index for index in range(VOCABULARY)}
    model = models.WordLevel(words, unk_token="<3>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), pad_token="<0>", bos_token="<1>", eos_token="<2>", unk_token="<3>"
    )


def tokens(count: int = SEQUENCES) -> Tensor:
    """(count, SEQUENCE_TOKENS) random token ids, the same on every call, without special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, VOCABULARY, (count, SEQUENCE_TOKENS), generator=generator)


def four_bit(dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig:
    """NF4 with double quantisation."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def linear_weights(folder: str) -> dict[str, Tensor]:
    """The checkpoint's weights that are quantised, by the names of their layers ("model.layers.0.mlp.up_proj")."""
    stored = load_file(Path(folder) / "model.safetensors")
    return {name.removesuffix(".weight"): value for name, value in stored.items() if name.endswith("_proj.weight")}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference over that of the reference; of the difference alone where the reference is zero."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    return float((value - reference).norm() / (reference.norm() or 1.0))
