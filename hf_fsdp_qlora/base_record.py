"""How the base of an adapter was quantised, kept beside the adapter so that a merge need not be told.

PEFT's `adapter_config.json` has no place for it, and an adapter merged into other weights than it was trained on is
wrong in silence. The record is a file of its own, which PEFT ignores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, HqqConfig

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.quantization import (
    BlockwiseFourBitConfig,
    DenseConfig,
    DynamicInt8Config,
    LinearInt8Config,
    backend_for_config,
)

RECORD_NAME = "base_quantization.json"
_ATTRIBUTE = "hf_fsdp_qlora_base_record"
_CLASSES = {
    kind.__name__: kind
    for kind in (
        BitsAndBytesConfig,
        BlockwiseFourBitConfig,
        DenseConfig,
        DynamicInt8Config,
        HqqConfig,
        LinearInt8Config,
    )
}


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter was trained on.

    Attributes:
        quantization_config: the config object, None for an unquantised base.
        dtype: what weights were cast to before they were quantised.
    """

    quantization_config: Any
    dtype: torch.dtype


def remember_base(model: torch.nn.Module, quantization_config: Any, dtype: torch.dtype) -> None:
    """Leave the record on a loaded model."""
    setattr(model, _ATTRIBUTE, BaseRecord(quantization_config, dtype))


def write_record(model: torch.nn.Module, folder: Path) -> None:
    """Write the record of a loaded model beside every adapter in the folder."""
    record: BaseRecord | None = getattr(model, _ATTRIBUTE, None)
    if record is None:
        return
    config = record.quantization_config
    values = {
        "config_class": None if config is None else type(config).__name__,
        "quantization_config": None if config is None else config.to_dict(),
        "dtype": str(record.dtype).removeprefix("torch."),
    }
    for adapter in folder.rglob("adapter_config.json"):
        text = json.dumps(values, indent=2, default=str) + "\n"
        (adapter.parent / RECORD_NAME).write_text(text, encoding="utf-8")


def read_record(adapter: Path) -> BaseRecord | None:
    """The record beside an adapter; None if it has none, as one that something else has trained.

    Raises:
        ConfigError: the base was quantised by a config that did not come with this package or transformers.
    """
    file = adapter / RECORD_NAME
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    dtype = getattr(torch, values["dtype"])
    name = values["config_class"]
    if name is None:
        return BaseRecord(None, dtype)
    if name not in _CLASSES:
        raise ConfigError(f"{file} was written with a {name}, which is not known here. Pass quantization_config.")
    settings = values["quantization_config"]
    if name in (DenseConfig.__name__, DynamicInt8Config.__name__, LinearInt8Config.__name__):
        settings.pop("quant_method")  # it follows from the class
    return BaseRecord(_CLASSES[name].from_dict(settings), dtype)


def settle_record(
    adapter: Path, quantization_config: Any, dtype: torch.dtype | None, base_dtype: torch.dtype
) -> BaseRecord:
    """What an adapter was trained on, by its own record or by the caller's word, which must agree.

    Args:
        adapter: its folder.
        quantization_config: the caller's, or None.
        dtype: the caller's, or None.
        base_dtype: of the checkpoint; what training cast to if nobody says otherwise.

    Raises:
        ConfigError: neither says it, they disagree, or the base was not quantised.
    """
    try:
        recorded = read_record(adapter)
    except ConfigError:
        if quantization_config is None:
            raise
        recorded = None
    if recorded is None and quantization_config is None:
        raise ConfigError(
            f"{adapter} has no {RECORD_NAME}: it was not saved by this package, or before it kept one. "
            "into='dequantized' then needs the quantization_config of training (--quant-type on the command line)."
        )
    if recorded is None:
        return BaseRecord(quantization_config, dtype or base_dtype)
    if recorded.quantization_config is None:
        raise ConfigError(f"{adapter} was trained on a base that was not quantised. Use into='original'.")
    if dtype not in (None, recorded.dtype):
        raise ConfigError(
            f"{adapter} was trained on weights cast to {recorded.dtype} before they were quantised; dtype={dtype} "
            "would give others. Leave dtype out."
        )
    given = recorded.quantization_config if quantization_config is None else quantization_config
    specs = [backend_for_config(config, recorded.dtype).spec for config in (given, recorded.quantization_config)]
    if _of_weights(specs[0]) != _of_weights(specs[1]):
        raise ConfigError(
            f"{adapter} was trained on {specs[1]}, but quantization_config says {specs[0]}. Leave quantization_config "
            "out."
        )
    return recorded


def other_base(adapter: Path, quantization_config: Any, dtype: torch.dtype) -> str | None:
    """How the base that an adapter is loaded on differs from the one it was trained on.

    Args:
        adapter: its folder. One on the hub is not looked at.
        quantization_config: of the base it is loaded on; None is an unquantised one.
        dtype: what that base's weights are cast to.

    Returns:
        A sentence, or None: it is the same, there is no record, or the record is of a config that is not known here or
        whose library is not installed.
    """
    given = _weights_of(BaseRecord(quantization_config, dtype))
    try:
        recorded = read_record(adapter)
        trained = given if recorded is None else _weights_of(recorded)
    except (ConfigError, ImportError):  # transformers' HqqConfig cannot be made without hqq
        return None
    if trained == given:
        return None
    return f"{adapter} was trained on {trained}, and is loaded on {given}: losses will not be those of training."


def _weights_of(record: BaseRecord) -> str:
    if record.quantization_config is None:
        return "an unquantised base"  # in any dtype: that rounds each weight by itself
    spec = backend_for_config(record.quantization_config, record.dtype).spec
    return f"{_of_weights(spec)} made from {record.dtype}"


def _of_weights(spec: str) -> str:
    """A spec without its last part, a dtype: that of matrix products, which weights do not depend on, or the common
    one."""
    return spec.rpartition("/")[0]
