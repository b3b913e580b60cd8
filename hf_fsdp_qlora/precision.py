"""Precision presets: one name sets every dtype of a run, so that no two of them can disagree.

| preset | weights and compute | adapters | gradients reduced in | autocast |
| --- | --- | --- | --- | --- |
| `bf16_fp32_adapters` (default) | bfloat16 | float32 | float32 | |
| `bf16_fp32_reduce` | bfloat16 | bfloat16 | float32 | |
| `bf16` | bfloat16 | bfloat16 | bfloat16 | |
| `fp32_autocast` | float32 | float32 | float32 | bfloat16 |
| `fp32` | float32 | float32 | float32 | |

"Weights" is the dtype that weights are cast to before they are quantised and that they dequantise to; everything that
is not quantised is held in it. It is also FSDP's `param_dtype` and, under FSDP1, the storage dtype of the rows.
Buffers are never cast: rotary frequencies stay float32 in every preset. Under `fp32_autocast` matrix products run in
bfloat16 on every engine, also under FSDP2, where accelerate opens no autocast.

There is no fp16 preset: see `FP16_REASON`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_fsdp_qlora.errors import ConfigError

FP16_REASON = (
    "a weight above float16's largest number (65504) becomes infinite, and quantising it to 4 bits makes its block "
    "NaN, with double quantisation the whole tensor; float16 gradients need a loss scaler, and torch's refuses "
    "float16 masters ('Attempting to unscale FP16 gradients')"
)
CUSTOM = "custom"
_FP16_FIX = "Use precision='bf16_fp32_adapters', or 'fp32' on a card without bfloat16."


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run.

    Attributes:
        name: the preset's, or CUSTOM for dtypes that were given one by one: then accelerate's `mixed_precision` says
            whether there is an autocast.
        dtype: of weights before quantisation and after dequantisation, of everything unquantised, and of compute.
        adapter_dtype: of adapters and other trained parameters.
        reduce_dtype: in which FSDP sums gradients over the ranks.
        autocast_dtype: of matrix products if it is not `dtype`; None opens no autocast.
    """

    name: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    reduce_dtype: torch.dtype = torch.float32
    autocast_dtype: torch.dtype | None = None

    @property
    def is_preset(self) -> bool:
        """Whether the user asked for it by name."""
        return self.name != CUSTOM

    @property
    def param_dtype(self) -> torch.dtype | None:
        """What FSDP casts gathered parameters to; None means that they stay as they are stored."""
        return None if self.dtype == torch.float32 else self.dtype


PRESETS = {
    preset.name: preset
    for preset in (
        Precision("bf16_fp32_adapters", torch.bfloat16, torch.float32),
        Precision("bf16_fp32_reduce", torch.bfloat16, torch.bfloat16),
        Precision("bf16", torch.bfloat16, torch.bfloat16, reduce_dtype=torch.bfloat16),
        Precision("fp32_autocast", torch.float32, torch.float32, autocast_dtype=torch.bfloat16),
        Precision("fp32", torch.float32, torch.float32),
    )
}


def resolve_precision(
    name: str | None, *, dtype: torch.dtype | str | None = None, adapter_dtype: torch.dtype | str | None = None
) -> Precision:
    """The preset of that name, or what the given dtypes describe.

    Args:
        name: a preset; None goes by the dtypes, bfloat16 with float32 adapters if those are None too.
        dtype: as in `load_model`; with a preset, None or the preset's own.
        adapter_dtype: likewise.

    Raises:
        ConfigError: no such preset or dtype, or a dtype that contradicts the preset.
    """
    dtypes = {"dtype": _as_dtype("dtype", dtype), "adapter_dtype": _as_dtype("adapter_dtype", adapter_dtype)}
    if name is None:
        return Precision(CUSTOM, dtypes["dtype"] or torch.bfloat16, dtypes["adapter_dtype"] or torch.float32)
    if name == "fp16":
        raise ConfigError(f"precision='fp16' is refused: {FP16_REASON}. {_FP16_FIX}")
    if name not in PRESETS:
        raise ConfigError(f"precision={name!r} is unknown; use one of {', '.join(PRESETS)}.")
    for argument, given in dtypes.items():
        own = getattr(PRESETS[name], argument)
        if given is not None and given != own:
            raise ConfigError(
                f"precision={name!r} means {argument}={own}, but {argument}={given} is set too. Remove one of the two."
            )
    return PRESETS[name]


def recipe_values(name: str) -> dict[str, Any]:
    """What a preset means in the keys of a recipe: `dtype`, `adapter_dtype` and `bf16`.

    Raises:
        ConfigError: no such preset.
    """
    preset = resolve_precision(name)
    return {
        "dtype": str(preset.dtype).removeprefix("torch."),
        "adapter_dtype": str(preset.adapter_dtype).removeprefix("torch."),
        "bf16": torch.bfloat16 in (preset.dtype, preset.autocast_dtype),
    }


def check_precision(precision: Precision, quantization_config: Any, *, mixed_precision: str, engine: str) -> None:
    """Refuse dtypes that contradict each other across the quantisation config, the launcher and the preset.

    Args:
        quantization_config: None, or the config that weights are quantised with.
        mixed_precision: accelerate's setting: "no", "bf16", "fp16", ...
        engine: of `resolve_engine`.

    Raises:
        ConfigError: naming the pair of settings and what to change.
    """
    four_bit = bool(getattr(quantization_config, "load_in_4bit", False))
    check_mixed_precision(precision, mixed_precision, four_bit=four_bit)
    if engine == "fsdp1" and precision.dtype == torch.float16:
        raise ConfigError(f"dtype=torch.float16 with FSDP1 is refused: {FP16_REASON}. {_FP16_FIX}")
    compute = getattr(quantization_config, "bnb_4bit_compute_dtype", None)
    fitting = (None, torch.float32, precision.dtype, precision.autocast_dtype)  # float32 is bitsandbytes' "unset"
    if precision.is_preset and four_bit and compute not in fitting:
        raise ConfigError(
            f"precision={precision.name!r} computes in {precision.autocast_dtype or precision.dtype}, but "
            f"bnb_4bit_compute_dtype={compute}. Leave bnb_4bit_compute_dtype out."
        )


def check_mixed_precision(precision: Precision, mixed_precision: str, *, four_bit: bool) -> None:
    """The part of `check_precision` that the trainer's arguments can still break after the model is loaded.

    Raises:
        ConfigError: as there.
    """
    if mixed_precision == "fp16" and four_bit:
        raise ConfigError(
            f"mixed_precision: fp16 with 4-bit weights (load_in_4bit) is refused: {FP16_REASON}. Set mixed_precision: "
            "bf16 in the accelerate config (and bf16: true, fp16: false in the training arguments)."
        )
    if mixed_precision == "bf16" and precision.name == "fp32":
        raise ConfigError(
            "precision='fp32' with mixed_precision: bf16 would compute in bfloat16 on some engines and in float32 on "
            "others. Set mixed_precision: no in the accelerate config (and bf16: false in the training arguments), or "
            "use precision='fp32_autocast'."
        )


def _as_dtype(argument: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and resolved not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"{argument}={dtype!r} is not one to load weights in; use bfloat16, float16 or float32.")
    return resolved
