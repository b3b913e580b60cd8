"""Adapters to disk and back, in PEFT's own layout, from a model that may be sharded.

PEFT writes what it finds in the model's state dict. That is wrong here in two ways: a sharded tensor cannot be
written, and frozen base weights are packed bytes that nobody may gather or store. So the functions below take the
adapter's entries alone, gather those, and let PEFT write them: the result is a standard PEFT directory that stock
PEFT loads, whatever the engine and the number of ranks.

Loading goes the other way without a collective: every rank reads the file and copies its own part of each tensor.

Left out: merging (`merge.py`), and adapters that are not in a PeftModel.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from hf_fsdp_qlora.base_record import write_record
from hf_fsdp_qlora.distributed import rank, same_outcome
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.fsdp1 import is_wrapped
from hf_fsdp_qlora.fsdp1_state import parameter_shapes, plain_names, read_parameters, write_parameters
from hf_fsdp_qlora.sharding import write_full_tensor

MODEL_CARD = "README.md"
T = TypeVar("T")


def save_adapter(model: PeftModel, output_dir: str | os.PathLike[str]) -> None:
    """Write the adapter as a standard PEFT directory (`adapter_model.safetensors`, `adapter_config.json`).

    Collective: call it on every rank. Only adapter tensors are gathered; rank 0 writes. Each file replaces an older
    one in one step, so a run that dies while it saves leaves the old file or the new one, never half of one.

    Args:
        model: what `load_model` returned with a `peft_config` or an adapter, sharded or not.
        output_dir: created if needed; other files in it are left alone.

    Raises:
        ConfigError: the model has no adapter.
        RuntimeError: writing failed on rank 0; raised on the other ranks, which did not write.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(f"save_adapter needs a model with an adapter, got {type(model).__name__}. Pass peft_config.")
    state_dict = gather_adapter(model)
    with same_outcome(f"saving the adapter to {output_dir}"):
        if rank() == 0:
            write_peft_directory(model, output_dir, state_dict)


def gather_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's whole tensors on the CPU of rank 0, by their names in the model; empty on other ranks.

    Collective when the model is sharded. Frozen base weights are not gathered: `trainer_compat.attach` puts empty
    placeholders in the state dict for them.
    """
    if is_wrapped(model):
        names = {name: name for name in parameter_shapes(model)}
        adapters = [adapter_entries(model, names, adapter_name=adapter) for adapter in model.peft_config]
        return read_parameters(model, {name for entries in adapters for name in entries.values()})
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor for name, tensor in full.items() if isinstance(tensor, torch.Tensor) and tensor.numel()}


def write_peft_directory(
    model: PeftModel, output_dir: str | os.PathLike[str], state_dict: dict[str, torch.Tensor], **kwargs: Any
) -> None:
    """Have PEFT write `state_dict` next to `output_dir`, then move each file to its place. One process only.

    Args:
        state_dict: whole tensors by their names in the model; empty ones (placeholders) are not written.
        kwargs: further arguments of `PeftModel.save_pretrained`.
    """
    target = Path(output_dir)
    target.mkdir(parents=True, exist_ok=True)
    # On the same file system as the target, so that each file can be moved in one step.
    staging = Path(tempfile.mkdtemp(dir=target, prefix=".saving-"))
    try:
        # "auto" looks for the base's config on the hub, and may add base embeddings, which are placeholders here.
        kwargs.setdefault("save_embedding_layers", False)
        kept = {name: tensor for name, tensor in state_dict.items() if tensor.numel()}
        if (target / MODEL_CARD).is_file():
            shutil.copy(target / MODEL_CARD, staging)  # PEFT updates a model card that is there
        with plain_names(model):
            type(model).save_pretrained(model, str(staging), state_dict=kept, **kwargs)
        write_record(model, staging)
        for file in sorted(path for path in staging.rglob("*") if path.is_file()):
            place = target / file.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(staging)


def restore_adapter(model: PeftModel, directory: str | os.PathLike[str]) -> None:
    """Copy saved adapters into the model's tensors in place, each rank its own part. Every rank reads the files.

    Args:
        model: a PeftModel with the same adapters, plain or sharded.
        directory: a PEFT directory; an adapter not called "default" is in the subdirectory of that name.

    Raises:
        ConfigError: files are missing or hold other tensors than the model's adapter has. On every rank.
    """
    if is_wrapped(model):
        _restore_under_fsdp1(model, Path(directory))
        return
    state_dict = model.state_dict()
    for name in model.peft_config:
        path = _weights_of(Path(directory), name)
        live = adapter_entries(model, state_dict, adapter_name=name)
        shapes = {key: tensor.shape for key, tensor in live.items()}
        with same_outcome(f"reading the adapter from {path}"), _open_fitting(path, shapes) as file, torch.no_grad():
            for key, tensor in live.items():
                write_full_tensor(tensor, file.get_tensor(key))


def adapter_entries(model: PeftModel, entries: dict[str, T], *, adapter_name: str) -> dict[str, T]:
    """Those of `entries` (by name in the model) that belong to an adapter, by their names in the adapter's file."""
    with plain_names(model):
        return get_peft_model_state_dict(
            model, state_dict=entries, adapter_name=adapter_name, save_embedding_layers=False
        )


def _restore_under_fsdp1(model: PeftModel, directory: Path) -> None:
    shapes = parameter_shapes(model)
    for adapter in model.peft_config:
        path = _weights_of(directory, adapter)
        names = adapter_entries(model, {name: name for name in shapes}, adapter_name=adapter)
        wanted = {key: shapes[name] for key, name in names.items()}
        with same_outcome(f"reading the adapter from {path}"), _open_fitting(path, wanted) as file:
            values = {name: file.get_tensor(key) for key, name in names.items()}
        write_parameters(model, values)


def _weights_of(directory: Path, adapter_name: str) -> Path:
    return directory / ("" if adapter_name == "default" else adapter_name) / SAFETENSORS_WEIGHTS_NAME


@contextmanager
def _open_fitting(path: Path, live: dict[str, torch.Size]) -> Iterator[Any]:
    """The file, if it holds just the tensors of these shapes."""
    if not path.is_file():
        raise ConfigError(f"There is no {path}: {path.parent} is no checkpoint of this model's adapter.")
    with safe_open(path, framework="pt") as file:
        _check_fits(path, {key: file.get_slice(key).get_shape() for key in file.keys()}, live)  # noqa: SIM118
        yield file


def _check_fits(path: Path, saved: dict[str, list[int]], live: dict[str, torch.Size]) -> None:
    problems = [f"{key} is missing" for key in live.keys() - saved.keys()]
    problems += [f"{key} is not part of the model's adapter" for key in saved.keys() - live.keys()]
    problems += [
        f"{key} has shape {tuple(saved[key])}, the model needs {tuple(live[key])}"
        for key in live.keys() & saved.keys()
        if tuple(saved[key]) != tuple(live[key])
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:3])
        raise ConfigError(
            f"{path} does not fit the model's adapter ({len(problems)} differences: {listed}). Resume with the "
            "peft_config that the checkpoint was trained with."
        )
