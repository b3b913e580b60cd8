"""PEFT's LoRA layers with other forwards: over packed rows, and over plain weights without copies of their inputs."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from hf_fsdp_qlora.dora import QuantizedDora, dora_forward
from hf_fsdp_qlora.fsdp1 import is_wrapped
from hf_fsdp_qlora.siblings import LoraSiblings


class QuantizedLoraLinear(LoraLinear):
    """PEFT's LoRA layer over a `QuantizedLinear`.

    Everything but merging is inherited. One plain adapter that computes in the dtype of the base is added by the
    base's own product (`apply_lora_linear`): no pass over the output for it. Otherwise the forward differs from PEFT's
    plain one as PEFT's own 4-bit layer does: the update is rounded to the dtype of the base output before it is added,
    so that no float32 copy of a whole output appears and the values equal those of stock QLoRA.
    """

    fuse: bool = True
    """Whether the base's product may add the adapter; a class attribute to switch it off for a comparison."""

    siblings: LoraSiblings | None = None
    """The layers that read the same input and may compute together with this one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `x`.

        Outside autocast `x` is cast to the adapter's dtype at that moment: the masters' dtype in one process, the
        compute dtype where FSDP2 has cast the gathered adapter.
        """
        if self.disable_adapters or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) == 1 and active[0] in self.lora_variant:
            return dora_forward(self, x, active[0])
        if len(active) == 1 and self.siblings is not None:
            output = self.siblings.output(self, x, active[0])
            if output is not None:
                return output
        if len(active) == 1 and self.fusible(x, active[0]):
            weights = self.lora_A[active[0]].weight, self.lora_B[active[0]].weight
            return self.base_layer(x, lora=(*weights, self.scaling[active[0]]))
        result = self.base_layer(x)
        for name in active:
            if name in self.lora_variant:
                result = self.lora_variant[name].forward(self, name, x, result)
                continue
            lora_a: Any = self.lora_A[name]
            # A unit of FSDP1 casts its input itself, and does not show the dtype it computes in.
            if not torch.is_autocast_enabled(x.device.type) and not is_wrapped(lora_a):
                x = self._cast_input_dtype(x, lora_a.weight.dtype)
            update = self.lora_B[name](lora_a(self.lora_dropout[name](x))) * self.scaling[name]
            result = result + update.to(result.dtype)
        return result

    def fusible(self, x: Tensor, name: str) -> bool:
        """Whether `apply_lora_linear` computes what this layer means: one input, one dtype, nobody watching A or B."""
        base: Any = self.base_layer
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        dropout = self.lora_dropout[name]
        dropped = self.training and not isinstance(dropout, nn.Identity)
        biases = lora_b.bias is not None or (base.bias is not None and base.bias.requires_grad)
        watched = any(part._forward_hooks or part._forward_pre_hooks for part in (lora_a, lora_b))
        if not self.fuse or dropped or biases or watched or is_wrapped(lora_a):
            return False
        device = x.device.type
        return torch.is_autocast_enabled(device) or lora_a.weight.dtype == base.product_dtype(device) == x.dtype

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The variants of LoRA that work over rows."""
        return {(): None, ("use_dora",): QuantizedDora}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the sum would have to be quantized again, and a rank holds only some of the rows.

        Raises:
            NotImplementedError: always; it names the way to merge.
        """
        raise NotImplementedError(
            "a LoRA adapter cannot be merged into quantized rows in place. Save the adapter, then merge it into the "
            "16-bit checkpoint with hf_fsdp_qlora.merge_adapter or `hf-fsdp-qlora merge`."
        )

    def unmerge(self) -> None:
        """Refuse, as `merge` does.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("nothing is merged: a LoRA adapter is never merged into quantized rows in place.")


class DenseLoraLinear(LoraLinear):
    """PEFT's LoRA layer over an `nn.Linear`, without its detour under autocast: PEFT casts the input to the float32 of
    the adapter, and autocast casts that back. The values are the same; the float32 copy and a 16-bit copy per layer,
    which backward keeps in place of the one input that neighbours share, are saved. (Dropout is then of 16-bit values,
    as in PEFT's 4-bit layer, and may draw others than of float32.)

    DoRA's norms do depend on the dtype of the input: there everything is PEFT's.
    """

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        autocast = isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)
        return x if autocast and not self.lora_variant else super()._cast_input_dtype(x, dtype)
