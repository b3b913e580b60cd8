"""A plain model from the masters: safetensors files that `from_pretrained` loads anywhere.

Tensors go to disk one at a time, so neither the host nor a device holds a second copy of the model. They are in the
dtype in which the model computes, rounded once from the master: what a run with 16-bit weights evaluates, and half the
size of float32 masters, which checkpoints hold.

Files are written beside their places and moved there at the end, weights of an older export first out of the way and
the index last: a folder never looks like a whole model that is half old and half new.

Left out: the tokenizer, which the trainer saves itself, and the code of models with custom code.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_fsdp_qlora.checkpoint_writer import MAX_SHARD_BYTES, CheckpointWriter
from hf_fsdp_qlora.distributed import rank, same_outcome
from hf_fsdp_qlora.engine import resolve_device
from hf_fsdp_qlora.rotary.masters import Masters, gather_whole

_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", SAFE_WEIGHTS_INDEX_NAME)


def export_model(
    model: PreTrainedModel,
    masters: Masters,
    output_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights, config and generation config. Collective; rank 0 writes.

    Args:
        model: for its names, its persistent buffers and its configs.
        masters: up to date, those of active blocks too.
        output_dir: created if needed. Weight files in it are replaced; other files are left alone.
        dtype: of the weights.
        max_shard_bytes: of weights in one file.

    Raises:
        OSError: writing failed; on rank 0, and a RuntimeError that quotes it on the others.
    """
    target = Path(output_dir)
    with same_outcome(f"creating {target}"):
        if rank() == 0:
            target.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(dir=target, prefix=".saving-"))
    errors: list[OSError] = []
    tensors = export_tensors(model, masters, dtype=dtype)
    try:
        if rank() == 0:
            _write(tensors, staging, max_shard_bytes, errors)
        for _ in tensors:  # what this rank is not to write, it still has to send
            pass
        with same_outcome(f"saving the model to {target}"):
            if errors:
                raise errors[0]
            if rank() == 0:
                _write_configs(model, staging, dtype)
                _replace(staging, target)
    finally:
        if rank() == 0:
            shutil.rmtree(staging)


def export_tensors(model: PreTrainedModel, masters: Masters, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, on the host. Collective: every rank must exhaust it.

    Tied weights have the name that the model gives the first of them, whichever name the checkpoint used.
    """
    device = resolve_device()
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name in masters.stored:
        whole = gather_whole(masters, name, dtype=dtype, device=device)
        yield first_names[id(model.get_parameter(name))], whole.cpu()
        del whole
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer.cpu()


def _write(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int, errors: list[OSError]) -> None:
    """Write until there is an error, which is noted instead of raised."""
    try:
        with CheckpointWriter(folder, max_shard_bytes=max_shard_bytes) as writer:
            for name, tensor in tensors:
                writer.add({name: tensor})
    except OSError as error:
        errors.append(error)


def _write_configs(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    config: Any = type(model.config).from_dict(model.config.to_dict())
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _replace(staging: Path, target: Path) -> None:
    for pattern in _WEIGHTS:
        for old in target.glob(pattern):
            old.unlink()
    for file in sorted(staging.iterdir(), key=lambda path: path.name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        os.replace(file, target / file.name)
