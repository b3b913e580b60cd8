"""LoRA over layers that are not quantised: PEFT's own numbers, without its copies under autocast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from hf_fsdp_qlora import load_model
from tests.lora_models import SEED, TOKENS, assert_same_tensors, gradients, stock_model
from tests.tiny_models import save_tiny_model


def step(model: PeftModel, autocast: bool) -> tuple[Tensor, set[torch.dtype]]:
    """Logits of one step, and the dtypes in which inputs reach the adapters."""
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.add(args[0].dtype)

    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(look)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward()
    return output.logits, seen


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_unquantised_layers_equal_stock_peft_without_its_float32_inputs(
    tmp_path: Path, dtype: torch.dtype, autocast: bool
) -> None:
    """Bit for bit; under autocast inputs come as they are, where PEFT widens them."""
    save_tiny_model(tmp_path, "qwen2")
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ours: Any = load_model(tmp_path, peft_config=config, dtype=dtype, seed=SEED)
    stock = stock_model(tmp_path, config, dtype=dtype, quantized=False)
    logits, seen = step(ours.train(), autocast)
    expected, widened = step(stock, autocast)
    assert torch.equal(logits, expected)
    assert_same_tensors(gradients(ours), gradients(stock))
    assert widened == {torch.float32}
    # Outside autocast they must have the adapter's dtype. With it, products are bfloat16 in a float32 model too.
    assert seen == ({dtype, torch.bfloat16} if autocast else {torch.float32})


def test_dora_over_unquantised_layers_keeps_float32_inputs(tmp_path: Path) -> None:
    """PEFT computes the norms of the weights in that dtype."""
    save_tiny_model(tmp_path, "qwen2")
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, use_dora=True)
    model: Any = load_model(tmp_path, peft_config=config, dtype=torch.bfloat16)
    assert step(model.train(), autocast=True)[1] == {torch.float32}
