"""Fine-tune models that do not fit: 4-bit weights sharded while they load, through the stock trainers.

Names are imported when first used, so that a command that needs no torch does not wait for it.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_model": "loading",
    "QuantizedLinear": "linear",
    "QuantizationBackend": "quantization",
    "register_backend": "quantization",
    "BlockwiseFourBitConfig": "quantization",
    "DynamicInt8Config": "quantization",
    "LinearInt8Config": "quantization",
    "MemoryCallback": "callbacks",
    "ThroughputCallback": "callbacks",
    "WeightIntegrityCallback": "callbacks",
    "InterruptCallback": "callbacks",
    "save_adapter": "export",
    "merge_adapter": "merge",
    "quantize_checkpoint": "quantize_checkpoint",
    "estimate_memory": "memory",
    "MemoryEstimate": "memory",
    "load_recipe": "config",
    "validate": "validation",
    "RotaryConfig": "rotary.config",
    "RotaryCallback": "rotary.callback",
    "prepare_rotary": "rotary.prepare",
    "ConfigError": "errors",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
