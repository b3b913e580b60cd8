"""What a quantisation library must offer to take part, and the table of those that do.

A backend turns a run of weights into rows of bytes and rows of bytes back into weights. It knows nothing of ranks,
files or modules; the loader hands it the rows of one rank and a way to see statistics of the whole tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.formats import RowFormat, WideShape

GatherRows = Callable[[Tensor], Tensor]
"""(local_rows, k) on this rank -> (num_rows, k) of the whole tensor, on every rank."""


class QuantizationBackend(ABC):
    """One way to store a weight in rows. Instances are immutable and equal when their `spec` is.

    Attributes:
        format: the layout of a row.
        spec: a string that names the backend and all its settings. The custom op carries it, because an op's schema
            takes no Python objects.
        dtype: the dtype weights are quantised from and dequantised to.
        compute_dtype: the dtype of the matrix product.
        whole_tensor: `quantize` must see all weights of a tensor at once. One rank then reads the tensor and quantises
            it, and the rows are handed out; otherwise every rank reads and quantises its own rows. Which weights share
            a row is the backend's choice then; without it, a row holds a run of the flattened weight.
    """

    whole_tensor: bool = False
    format: RowFormat
    spec: str
    dtype: torch.dtype
    compute_dtype: torch.dtype

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, dtype: torch.dtype) -> QuantizationBackend:
        """Build the backend that a quantisation config asks for.

        Raises:
            ConfigError: the config asks for something this backend cannot store in rows.
        """

    @classmethod
    def skip_modules(cls, config: Any) -> list[str] | None:
        """The linear layers that a quantisation config leaves alone, in upstream's pattern language.

        Returns:
            None for transformers' default: the head and what is tied to it.
        """
        return config.modules_to_not_convert

    def check_weight(self, name: str, shape: tuple[int, int]) -> None:  # noqa: B027  (optional, not forgotten)
        """Refuse a weight that cannot be stored, before anything is read. The default takes every shape.

        Args:
            name: of the layer, for the message.
            shape: (out_features, in_features).

        Raises:
            ConfigError: the shape does not go with the config.
        """

    @abstractmethod
    def quantize(self, weights: Tensor, numel: int, gather_rows: GatherRows) -> tuple[Tensor, Tensor]:
        """Quantise the rows that one rank owns.

        Args:
            weights: (n,) in `dtype`, the weights of this rank's rows; only the tensor's last row may be short, and n
                is 0 on a rank that owns no row. With `whole_tensor`, n is numel.
            numel: elements of the whole tensor.
            gather_rows: collective; every rank calls it the same number of times, also with no rows.

        Returns:
            codes (local_rows, code_bytes) and statistics (local_rows, stats_bytes), uint8, on the device of `weights`.
        """

    @abstractmethod
    def dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int]) -> Tensor:
        """The weight that the rows stand for.

        Args:
            codes: (num_rows, code_bytes) uint8, contiguous.
            stats: (num_rows, stats_bytes) uint8, contiguous.
            shape: (out_features, in_features).

        Returns:
            (out_features, in_features) in `dtype`.
        """

    def traced_dequantize(self, codes: Tensor, stats: Tensor, shape: tuple[int, int], used_with: Tensor) -> Tensor:
        """`dequantize` for code that `torch.compile` traces: an operation that it does not look into.

        Args:
            used_with: what the weight will be multiplied with, which orders the operation: a weight that depends on a
                gradient cannot be made in forward and kept, and is another than the weight of the forward.
        """
        return dequantize_op(codes, stats, self.spec, shape[0], shape[1], used_with)

    def joins(self, wide: WideShape) -> bool:
        """Whether `dequantize_wide` writes such a weight at once on this machine's accelerator, so that it pays."""
        return False

    def dequantize_wide(
        self,
        codes: Sequence[Tensor],
        stats: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        wide: WideShape,
        used_with: Tensor,
    ) -> Tensor:
        """The weights of several layers, one below the other, with columns behind them that hold the B of their
        adapters, each in its own place and zeros beside it. For code that is traced.

        Args:
            codes, stats: of each layer, as in `dequantize`.
            lora_b: (out_features, rank) of each, contiguous, in the dtype that is wanted.
            wide: the shapes.
            used_with: as in `traced_dequantize`.

        Returns:
            `wide.shape` in the dtype of `lora_b`. This one is the reference: every value is copied once more.
        """
        parts = []
        for index, (_, column, out_features, rank) in enumerate(wide.members()):
            shape = (out_features, wide.in_features)
            weight = self.traced_dequantize(codes[index], stats[index], shape, used_with)
            columns = pad(lora_b[index], (column, wide.columns - column - rank))
            parts.append(torch.cat([weight.to(columns.dtype), columns], dim=1))
        return torch.cat(parts)

    def prepare(self, device: torch.device) -> None:  # noqa: B027  (optional, not forgotten)
        """Make what `traced_dequantize` needs on a device. Called once the device is known, before any tracing."""


@torch.library.custom_op("hf_fsdp_qlora::dequantize", mutates_args=())
def dequantize_op(
    codes: Tensor, stats: Tensor, spec: str, out_features: int, in_features: int, used_with: Tensor
) -> Tensor:
    """`backend_by_spec(spec).dequantize(codes, stats, (out_features, in_features))`."""
    return backend_by_spec(spec).dequantize(codes, stats, (out_features, in_features))


@dequantize_op.register_fake
def _(codes, stats, spec, out_features, in_features, used_with):  # type: ignore[no-untyped-def]
    return codes.new_empty(out_features, in_features, dtype=backend_by_spec(spec).dtype)


BackendT = TypeVar("BackendT", bound=QuantizationBackend)

_CONFIGURED: dict[str, type[QuantizationBackend]] = {}
_BY_SPEC: dict[str, QuantizationBackend] = {}


def register_backend(quant_method: str, backend: type[QuantizationBackend]) -> None:
    """Make `load_model` use `backend` for configs whose `quant_method` is this one.

    Args:
        quant_method: transformers' name for it (`quantization_config.quant_method`), such as "bitsandbytes".
    """
    _CONFIGURED[quant_method] = backend


def backend_for_config(config: Any, dtype: torch.dtype) -> QuantizationBackend:
    """The backend for a quantisation config object.

    Raises:
        ConfigError: no backend is registered for it, or the backend refuses it.
    """
    return share_backend(_backend_class(config).from_config(config, dtype))


def share_backend(backend: BackendT) -> BackendT:
    """The one instance with this backend's spec in this process, which `backend_by_spec` finds."""
    return cast(BackendT, _BY_SPEC.setdefault(backend.spec, backend))


def skip_modules(config: Any) -> list[str] | None:
    """The linear layers that a quantisation config leaves alone, see `QuantizationBackend.skip_modules`.

    Raises:
        ConfigError: no backend is registered for the config.
    """
    return _backend_class(config).skip_modules(config)


def quant_methods() -> list[str]:
    """The `quant_method` of every registered backend, sorted."""
    return sorted(_CONFIGURED)


def backend_by_spec(spec: str) -> QuantizationBackend:
    """The backend instance that `backend_for_config` or `share_backend` returned earlier in this process."""
    return _BY_SPEC[spec]


def in_rows(flat: Tensor, rows: int, width: int) -> Tensor:
    """(n,) -> (rows, width), zeros behind the last value."""
    return pad(flat, (0, rows * width - flat.numel())).view(rows, width)


def _backend_class(config: Any) -> type[QuantizationBackend]:
    method = getattr(config, "quant_method", None)
    name = str(getattr(method, "value", method))
    if name not in _CONFIGURED:
        raise ConfigError(
            f"quantization_config of type {type(config).__name__} (quant_method={name!r}) has no backend; "
            f"there are backends for: {', '.join(quant_methods())}."
        )
    return _CONFIGURED[name]
