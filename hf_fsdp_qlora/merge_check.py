"""How far a merged model is from the adapter model it was made from, measured on a text.

Merging rounds: the low-rank update is added to a 16-bit weight, and when the adapter was trained on a quantised base
but is merged into the original weights, the base itself changes. This says in two numbers what that costs. Both
models are loaded whole with stock transformers and PEFT, so it needs the memory that merging itself does not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from hf_fsdp_qlora.errors import ConfigError


@dataclass(frozen=True)
class MergeComparison:
    """Mean over all predicted tokens. The divergence is KL(unmerged || merged), in nats, as are the losses."""

    num_tokens: int
    loss_unmerged: float
    loss_merged: float
    kl_divergence: float


def compare_merged(
    merged: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    text: str,
    *,
    base_model: str,
    quantization_config: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    max_length: int = 512,
    trust_remote_code: bool = False,
) -> MergeComparison:
    """Compare a merged model with its base plus adapter on `text`.

    Args:
        merged: the merged folder; its tokenizer is used for both.
        adapter, base_model: what was merged, and into what.
        text: cut into pieces of `max_length` tokens; a last piece of a single token is dropped.
        quantization_config: load the unmerged base as training did, so that its error counts too. None keeps 16 bit.
        dtype: compute and weight dtype; None takes the checkpoint's.

    Raises:
        ConfigError: the text has fewer than two tokens.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=trust_remote_code)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    if len(tokens) < 2:
        raise ConfigError(f"The text has {len(tokens)} tokens; at least 2 are needed to measure a loss.")
    options["device_map"] = {"": torch.device(device)}
    merged_model = AutoModelForCausalLM.from_pretrained(merged, **options).eval()
    base = AutoModelForCausalLM.from_pretrained(base_model, quantization_config=quantization_config, **options)
    if base.get_input_embeddings().num_embeddings != merged_model.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(merged_model.get_input_embeddings().num_embeddings)
    unmerged_model = PeftModel.from_pretrained(base, adapter).eval()
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    for piece in tokens.split(max_length):
        if len(piece) < 2:
            continue
        sums += _piece_sums(unmerged_model, merged_model, piece.to(device))
        count += len(piece) - 1
    loss_unmerged, loss_merged, divergence = (sums / count).tolist()
    return MergeComparison(count, loss_unmerged, loss_merged, divergence)


@torch.no_grad()
def _piece_sums(unmerged: torch.nn.Module, merged: torch.nn.Module, piece: torch.Tensor) -> torch.Tensor:
    """(3,): summed loss of either model and summed divergence, over the tokens (n,) of one piece but the first."""
    logits = [model(input_ids=piece[None]).logits[0, :-1] for model in (unmerged, merged)]
    log_p, log_q = (values.float().log_softmax(-1) for values in logits)
    targets = piece[1:, None]
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    return torch.stack([-log_p.gather(1, targets).sum(), -log_q.gather(1, targets).sum(), divergence]).double().cpu()
