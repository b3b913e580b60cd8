"""DoRA over rows against PEFT's DoRA over stock bitsandbytes, and two ranks against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_fsdp_qlora import load_model, save_adapter
from tests.distributed import run_distributed
from tests.lora_models import SEED, TOKENS, bnb_config, gradients, stock_model
from tests.tiny_models import save_tiny_model

FSDP2 = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
KINDS = {"zero B": True, "random B": False}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases on q, k and v; tied embeddings."""
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def dora(init: bool, **changes: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=init, **changes)


def ours(path: Path, config: LoraConfig, **options: Any) -> PeftModel:
    quantization = bnb_config(torch.float32)
    return load_model(
        path, quantization_config=quantization, peft_config=config, dtype=torch.float32, seed=SEED, **options
    )


def magnitudes(model: PeftModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "magnitude" in name}


@pytest.mark.parametrize("init", KINDS.values(), ids=KINDS.keys())
def test_dora_equals_peft_over_bitsandbytes(qwen2: Path, init: bool) -> None:
    model, stock = ours(qwen2, dora(init)), stock_model(qwen2, dora(init), dtype=torch.float32, quantized=True)
    expected = magnitudes(stock)
    assert magnitudes(model).keys() == expected.keys() and len(expected) == 14
    for name, value in magnitudes(model).items():
        # The norm of a row of about a hundred float32 values, summed in another order.
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)
    outputs = [m.train()(input_ids=TOKENS, labels=TOKENS) for m in (model, stock)]
    # ||W + sBA|| is expanded here: float32 rounding, a few units larger than of the direct sum.
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    wanted = gradients(stock)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_dropout_acts_on_the_same_part_as_in_peft(qwen2: Path) -> None:
    config = dora(False, lora_dropout=0.5)
    results = []
    for model in (ours(qwen2, config), stock_model(qwen2, config, dtype=torch.float32, quantized=True)):
        torch.manual_seed(3)
        results.append(model.train()(input_ids=TOKENS).logits)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def train(path: str, out: str | None, init: bool) -> tuple[float, dict[str, Tensor]]:
    model = ours(Path(path), dora(init)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if out:
        save_adapter(model, out)
    full = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in magnitudes(model).items()}
    return loss.item(), full


@pytest.mark.parametrize("init", KINDS.values(), ids=KINDS.keys())
def test_two_ranks_train_dora_as_one_process_and_stock_peft_loads_it(qwen2: Path, init: bool, tmp_path: Path) -> None:
    ((alone, expected),) = run_distributed(train, str(qwen2), None, init, world_size=1, process_group=False)
    for loss, found in run_distributed(train, str(qwen2), str(tmp_path), init, env=FSDP2):
        # Three Adam steps in float32 on equal batches.
        assert loss == pytest.approx(alone, rel=1e-6)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(
        qwen2, quantization_config=bnb_config(torch.float32), dtype=torch.float32
    )
    # In train mode (there is no dropout): in eval mode bitsandbytes repacks CPU weights, and not of every shape.
    stock = PeftModel.from_pretrained(base.train(), tmp_path, is_trainable=True).train()
    again = load_model(
        qwen2, quantization_config=bnb_config(torch.float32), adapter_name_or_path=str(tmp_path), dtype=torch.float32
    )
    torch.testing.assert_close(again(input_ids=TOKENS).logits, stock(input_ids=TOKENS).logits, rtol=1e-5, atol=1e-5)
