"""How many bytes are quantised, sharded and neither, so that nothing stays in 16 bit unnoticed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor

from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.sharding import local_tensor


@dataclass(frozen=True)
class LoadReport:
    """What `load_model` did, as seen by this rank. It is `model.load_report`.

    Args:
        quantized_layers: linear layers stored as rows.
        unquantized_linears: names of the linear layers left in 16 or 32 bit (the head, `llm_int8_skip_modules`).
        quantized_bytes: rows of the whole model, codes and statistics.
        frozen_bytes: other frozen parameters of the whole model (embeddings, norms, head, biases).
        trainable_bytes: trainable parameters of the whole model.
        sharded_bytes: of all these, bytes in parameters that are split over the ranks.
        local_bytes: parameter bytes on this rank.
        read_bytes: bytes this rank read from the checkpoint.
        seconds: time `load_model` took on this rank.
    """

    quantized_layers: int
    unquantized_linears: tuple[str, ...]
    quantized_bytes: int
    frozen_bytes: int
    trainable_bytes: int
    sharded_bytes: int
    local_bytes: int
    read_bytes: int
    seconds: float

    @property
    def total_bytes(self) -> int:
        """All parameters of the whole model."""
        return self.quantized_bytes + self.frozen_bytes + self.trainable_bytes

    def summary(self) -> str:
        """A few lines for a log."""
        kept = ", ".join(self.unquantized_linears) or "none"
        return (
            f"{self.quantized_layers} linear layers quantised: {_size(self.quantized_bytes)}; frozen in full "
            f"precision: {_size(self.frozen_bytes)}; trainable: {_size(self.trainable_bytes)}. Linear layers left "
            f"unquantised: {kept}. {_size(self.sharded_bytes)} of {_size(self.total_bytes)} are sharded; this rank "
            f"holds {_size(self.local_bytes)} and read {_size(self.read_bytes)} in {self.seconds:.1f} s."
        )


def make_report(model: nn.Module, *, unquantized: list[str], read_bytes: int, seconds: float) -> LoadReport:
    """Count the bytes of a loaded model."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    rows = {id(parameter) for layer in layers for parameter in (layer.weight, layer.weight_stats)}
    sizes = {"quantized": 0, "trainable": 0, "frozen": 0}
    sharded = local = 0
    for parameter in model.parameters():
        num_bytes = parameter.numel() * parameter.element_size()
        kind = "quantized" if id(parameter) in rows else "trainable" if parameter.requires_grad else "frozen"
        sizes[kind] += num_bytes
        part = local_tensor(parameter)
        local += 0 if part.is_meta else part.numel() * part.element_size()
        sharded += num_bytes if isinstance(parameter, DTensor) else 0
    return LoadReport(
        quantized_layers=len(layers),
        unquantized_linears=tuple(unquantized),
        quantized_bytes=sizes["quantized"],
        frozen_bytes=sizes["frozen"],
        trainable_bytes=sizes["trainable"],
        sharded_bytes=sharded,
        local_bytes=local,
        read_bytes=read_bytes,
        seconds=seconds,
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"
