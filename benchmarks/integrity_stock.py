"""The stock stack under the same check: transformers and bitsandbytes with bf16 storage, sharded by accelerate.

Runs in processes of its own, in which `load_model` is never called, because it patches accelerate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from tiny_llama import four_bit, relative_error, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

DECODER_LAYER = "LlamaDecoderLayer"


@dataclass(frozen=True)
class ByteCheck:
    """What one look at the gathered weights found.

    Args:
        when: the moment.
        compared: bytes looked at.
        differing: bytes that are not those of unsharded bitsandbytes.
        weight_error: of the dequantised weights, relative L2, worst layer.
        logit_error: relative L2 against the unsharded model; None where logits were not computed.
    """

    when: str
    compared: int
    differing: int
    weight_error: float
    logit_error: float | None = None


def check_stock(folder: str) -> ByteCheck:
    """Load, shard with `Accelerator.prepare`, run one forward, and compare what an all-gather brings back."""
    device = PartialState().device
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=four_bit(torch.bfloat16, storage=torch.bfloat16),
        dtype=torch.bfloat16,
        device_map={"": device},
    )
    # No dropout here, and in eval mode bitsandbytes' CPU layers would repack their weights.
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    whole = {name: layer.weight.data.flatten().view(torch.uint8).clone() for name, layer in layers.items()}
    states = {name: layer.weight.quant_state for name, layer in layers.items()}
    inputs = tokens().to(device)
    with torch.no_grad():
        reference = model(input_ids=inputs, use_cache=False).logits
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model, _ = make_accelerator().prepare(model, optimizer)
    with torch.no_grad():
        logits = model(input_ids=inputs, use_cache=False).logits
    compared = differing = 0
    weight_error = 0.0
    for unit in model.modules():
        if not type(unit).__name__.endswith(DECODER_LAYER):
            continue
        unit.unshard()
        for name, layer in layers.items():
            if any(module is layer for module in unit.modules()):
                gathered = layer.weight.detach().flatten().view(torch.uint8)[: whole[name].numel()]
                compared += gathered.numel()
                differing += int((gathered != whole[name]).sum())
                error = relative_error(_dequantize(gathered, states[name]), _dequantize(whole[name], states[name]))
                weight_error = max(weight_error, error)
        unit.reshard()
    return ByteCheck("loaded", compared, differing, weight_error, relative_error(logits, reference))


def make_accelerator() -> Accelerator:
    """FSDP2 with bf16 mixed precision, as accelerate's own config would set it up."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[DECODER_LAYER],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
    if accelerator.distributed_type != DistributedType.FSDP:  # on CPU accelerate never says so by itself
        plugin.set_mixed_precision("bf16")
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def _dequantize(codes: Tensor, state: bnb.QuantState) -> Tensor:
    return bnb.dequantize_4bit(codes.view(-1, 1), state)
