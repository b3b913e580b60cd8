"""What the planner says FSDP gathers, against every allocation of a real step on gloo ranks.

A dispatch mode adds up all living storages after every operator, so shards, gathered parameters, buffers of
collectives, gradients and activations are all in the sum, whoever made them. Left out: the head's own moment, which
TRL computes in another way on the CPU, and cuBLAS.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from hf_fsdp_qlora import fsdp1, load_model
from hf_fsdp_qlora.activations import (
    EMBEDDING_MOMENT,
    FIRST_LAYER_MOMENT,
    FORWARD_MOMENT,
    HEAD_FETCH_MOMENT,
    LAYER_MOMENT,
    NORM_MOMENT,
)
from hf_fsdp_qlora.memory import estimate_memory
from hf_fsdp_qlora.memory_step import CUBLAS_BYTES
from hf_fsdp_qlora.model_shape import model_shape
from hf_fsdp_qlora.skeleton import decoder_layers
from hf_fsdp_qlora.trainer_compat.model import attachment
from tests.distributed import run_distributed
from tests.living_bytes import LivingBytes

SHAPE: dict[str, Any] = dict(
    hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=4096, max_position_embeddings=512,
)  # fmt: skip
"""Embedding and head are 2 MiB each in bf16, a layer's rows 0.4 MiB: no two sums of them are alike."""
TOKENS = 256
STEPS = 2  # optimizer states exist from the second on
FORWARD, BACKWARD = "forward to the head", "backward from the norm"


def peaks(path: str, engine: str, options: dict[str, bool]) -> tuple[int, dict[str, int]]:
    """On every rank: bytes before the last step, and the most in two parts of it."""
    loaded: Any = load_model(
        path,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        fsdp=engine,
        **options,  # type: ignore[arg-type]
    )
    base = loaded.get_base_model()
    add_fused_lm_head(base)
    loaded.gradient_checkpointing_enable({"use_reentrant": False})
    loaded.enable_input_require_grads()
    loaded.train()
    model = loaded
    if engine == "fsdp1":
        precision = attachment(loaded).precision  # type: ignore[union-attr]
        arguments = fsdp1.unit_arguments(
            loaded, decoder_layers(base), precision=precision, offload="none", device=torch.device("cpu")
        )
        model = fsdp1.wrap(loaded, arguments)
    parameters = [*model.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-4)
    living, found = LivingBytes(), dict[str, int]()

    def end(part: str) -> None:
        found[part], living.peak = living.peak, living.now()

    base.model.norm.register_forward_pre_hook(lambda *_: end(FORWARD))
    base.model.norm.register_forward_hook(lambda _, __, output: output.register_hook(lambda _: end("head")) and None)
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS))
    for step in range(STEPS):
        if step == STEPS - 1:
            states = [value for state in optimizer.state.values() for value in state.values()]
            for tensor in [*parameters, *states]:
                living.see(tensor)
            before = living.peak = living.now()
            with living:
                model(input_ids=tokens, labels=tokens, fused_lm_head=True).loss.backward()
            end(BACKWARD)
        else:
            model(input_ids=tokens, labels=tokens, fused_lm_head=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "ranks", "whole"),
    [("fsdp2", 1, ()), ("fsdp2", 2, ()), ("fsdp1", 2, ()), ("fsdp2", 2, ("replicate_head",)),
     ("fsdp2", 2, ("embedding_on_host",)), ("fsdp2", 2, ("replicate_head", "embedding_on_host"))],
)  # fmt: skip
def test_a_step_takes_what_the_planner_says(engine: str, ranks: int, whole: tuple[str, ...], tmp_path: Path) -> None:
    """Within 5 %, the planner's own goal, of all that comes on top of the shards."""
    original: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
    original.to(torch.bfloat16).save_pretrained(tmp_path)
    options: Any = dict.fromkeys(whole, True)
    shape = model_shape(tmp_path)
    estimate = estimate_memory(shape, engine=engine, gpus=ranks, lora_r=8, seq_len=TOKENS, **options)
    kinds = ("weights", "statistics", "other_weights", "replicated", "adapters", "optimizer")
    static = sum(estimate.gpu[kind] for kind in kinds)
    # On the CPU host memory is the device's.
    on_host = 2 * shape.embedding_numel if "embedding_on_host" in whole else 0
    moments = {name: size - static - CUBLAS_BYTES for name, size in estimate.moments.items()}
    for before, found in run_distributed(peaks, str(tmp_path), engine, options, world_size=ranks):
        assert before - on_host == pytest.approx(static, rel=0.02)
        forward = max(moments[name] for name in (EMBEDDING_MOMENT, FORWARD_MOMENT, HEAD_FETCH_MOMENT))
        assert found[FORWARD] - before == pytest.approx(forward, rel=0.05)
        backward = max(moments[name] for name in (NORM_MOMENT, LAYER_MOMENT, FIRST_LAYER_MOMENT))
        assert found[BACKWARD] - before == pytest.approx(backward, rel=0.05)
