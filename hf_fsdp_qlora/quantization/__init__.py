"""Quantised formats. Importing the package registers the backends that ship with it."""

from hf_fsdp_qlora.quantization import bitsandbytes as _bitsandbytes  # noqa: F401  (registers itself)
from hf_fsdp_qlora.quantization.base import (
    GatherRows,
    QuantizationBackend,
    backend_by_spec,
    backend_for_config,
    register_backend,
)
from hf_fsdp_qlora.quantization.configs import BlockwiseFourBitConfig

__all__ = [
    "BlockwiseFourBitConfig",
    "GatherRows",
    "QuantizationBackend",
    "backend_by_spec",
    "backend_for_config",
    "register_backend",
]
