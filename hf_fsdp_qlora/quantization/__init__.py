"""Quantised formats. Importing the package registers the backends that ship with it."""

from hf_fsdp_qlora.quantization import bitsandbytes as _bitsandbytes  # noqa: F401  (registers itself)
from hf_fsdp_qlora.quantization import dense as _dense  # noqa: F401  (registers itself)
from hf_fsdp_qlora.quantization import hqq as _hqq  # noqa: F401  (registers itself)
from hf_fsdp_qlora.quantization import int8 as _int8  # noqa: F401  (registers itself)
from hf_fsdp_qlora.quantization.base import (
    GatherRows,
    QuantizationBackend,
    backend_by_spec,
    backend_for_config,
    in_rows,
    quant_methods,
    register_backend,
    skip_modules,
)
from hf_fsdp_qlora.quantization.configs import (
    BlockwiseFourBitConfig,
    DenseConfig,
    DynamicInt8Config,
    LinearInt8Config,
)
from hf_fsdp_qlora.quantization.triton_build import triton_lacks

__all__ = [
    "BlockwiseFourBitConfig",
    "DenseConfig",
    "DynamicInt8Config",
    "GatherRows",
    "LinearInt8Config",
    "QuantizationBackend",
    "backend_by_spec",
    "backend_for_config",
    "in_rows",
    "quant_methods",
    "register_backend",
    "skip_modules",
    "triton_lacks",
]
