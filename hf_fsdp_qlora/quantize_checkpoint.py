"""Quantise a checkpoint once and for all: a folder in bitsandbytes 4 bits as stock transformers writes it.

Tensors are read, quantised and written one after the other, so a 70B model needs the memory of its largest tensor and
no GPU has to hold it. `load_model` then reads a quarter of the bytes, and stock transformers loads the folder too, to
the same values as when it quantises the original itself on the same kind of device.

With double quantisation the result depends on the mean of a tensor's absmax values, which on the CPU depends on the
number of threads (above 32,768 blocks); on a GPU it does not.

Left out: bitsandbytes' other formats, which load_model does not read back, and HQQ.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import tqdm

from hf_fsdp_qlora.base_checkpoint import copy_side_files, local_folder
from hf_fsdp_qlora.checkpoint import StoredTensor, TensorSlice, find_checkpoint, index_checkpoint, stream_slices
from hf_fsdp_qlora.checkpoint_writer import MAX_SHARD_BYTES, CheckpointWriter, new_folder
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.linear import QuantizedLinear
from hf_fsdp_qlora.matching import match_checkpoint
from hf_fsdp_qlora.prequantized import take_stored_config
from hf_fsdp_qlora.quantization import backend_for_config, skip_modules
from hf_fsdp_qlora.quantization.bitsandbytes import FourBitBackend
from hf_fsdp_qlora.quantization.stored import pack_weight
from hf_fsdp_qlora.skeleton import build_skeleton, replace_linears

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeReport:
    """What was written. `bytes_per_weight` counts the quantised weights alone, statistics and tables included."""

    output: str
    source: str
    num_quantized: int
    num_unquantized: int
    total_bytes: int
    bytes_per_weight: float
    unquantized_linears: tuple[str, ...]
    seconds: float


def quantize_checkpoint(
    model_name_or_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quantization_config: BitsAndBytesConfig,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> QuantizeReport:
    """Write a model in bitsandbytes 4 bits, readable by `load_model` and by stock `from_pretrained`.

    Args:
        model_name_or_path: hub id or folder of the original model.
        output: the folder to create. It must not exist or be empty.
        quantization_config: as for `load_model`; `llm_int8_skip_modules` and other block sizes are honoured.
        dtype: what weights are cast to before they are quantised, and the dtype of everything else.
        device: where tensors are quantised ("cpu", "cuda"); they visit it one at a time.
        max_shard_bytes: of tensors in one file.
        tensors: the weights by the model's parameter names, in any order, in place of the folder's own files; the
            folder then needs a config.json only. Tied weights come once.
        revision, token, trust_remote_code: as in `from_pretrained`.

    Raises:
        ConfigError: the output is not empty, the model or config cannot be honoured, or `tensors` does not fit the
            config. Nothing is left behind.
    """
    started = time.perf_counter()
    target, device = Path(output), torch.device(device)
    folder = local_folder(model_name_or_path, revision, token)
    plan = _Plan(folder, quantization_config, dtype, trust_remote_code)
    if tensors is None:
        files = find_checkpoint(os.fspath(model_name_or_path), revision=revision, token=token)
        matched, unused = match_checkpoint(plan.model, plan.wanted, index_checkpoint(files))
        if unused:
            logger.warning("The model has no use for %d tensors of the checkpoint: %s", len(unused), ", ".join(unused))
        tensors = _read(matched, device)
    with new_folder(target) as unfinished:
        with CheckpointWriter(unfinished, max_shard_bytes=max_shard_bytes) as writer:
            for name, tensor in plan.checked(tensors):
                writer.add(plan.written(name, tensor.to(device)))
        copy_side_files(folder, unfinished, tokenizer=folder)
        config = {**json.loads((folder / "config.json").read_text()), **plan.config_changes()}
        config.pop("torch_dtype", None)  # the old name of `dtype`
        (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    report = QuantizeReport(
        output=str(target), source=str(model_name_or_path), num_quantized=len(plan.backends),
        num_unquantized=plan.num_written - len(plan.backends), total_bytes=writer.total_bytes,
        bytes_per_weight=plan.quantized_bytes / plan.quantized_weights, unquantized_linears=tuple(plan.kept),
        seconds=time.perf_counter() - started,
    )  # fmt: skip
    logger.info("%s", asdict(report))
    return report


class _Plan:
    """What becomes of each tensor, and a count of what was done."""

    def __init__(self, folder: Path, config: BitsAndBytesConfig, dtype: torch.dtype, trust_remote_code: bool) -> None:
        self.dtype = dtype
        self.config = config
        backend = backend_for_config(config, dtype)
        if not isinstance(backend, FourBitBackend):
            raise ConfigError(
                f"quantize writes bitsandbytes 4-bit folders; {type(config).__name__} is another format. "
                "Pass BitsAndBytesConfig(load_in_4bit=True, ...)."
            )
        if config.bnb_4bit_quant_storage != torch.uint8:
            raise ConfigError(
                f"bnb_4bit_quant_storage={config.bnb_4bit_quant_storage} is a setting for training. Folders are "
                "written as uint8, which every engine reads; leave it at its default."
            )
        self.model: PreTrainedModel = build_skeleton(
            str(folder), dtype=dtype, trust_remote_code=trust_remote_code, hub_kwargs={}, model_kwargs={}
        )
        if take_stored_config(self.model.config) is not None:
            raise ConfigError(f"{folder} is in bitsandbytes 4 bits already. Quantise the model it was made from.")
        self.wanted: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        self.kept = replace_linears(self.model, backend, skip_modules=skip_modules(config), storage_dtype=torch.uint8)
        self.backends = {
            f"{name}.weight": backend
            for name, module in self.model.named_modules()
            if isinstance(module, QuantizedLinear)
        }
        self.num_written = self.quantized_bytes = self.quantized_weights = 0

    def checked(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, with an error for one that the model lacks, for a wrong shape, and for a missing one."""
        left = {id(tensor): name for name, tensor in self.wanted.items()}
        for name, tensor in tensors:
            parameter = self.wanted.get(name)
            if parameter is None or id(parameter) not in left:
                reason = "is no weight of the model" if parameter is None else "or its tied twin came before"
                raise ConfigError(f"{name} {reason}.")
            if parameter.shape != tensor.shape:
                raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, the model {tuple(parameter.shape)}.")
            del left[id(parameter)]
            yield name, tensor
        if left:
            raise ConfigError(f"{len(left)} weights of the model are missing: {', '.join(list(left.values())[:8])}.")

    def written(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What to write for a tensor, by name."""
        self.num_written += 1
        if name not in self.backends:
            is_parameter = isinstance(self.wanted[name], torch.nn.Parameter)
            return {name: tensor.to(self.dtype) if is_parameter and tensor.is_floating_point() else tensor}
        group = {name + part: value for part, value in pack_weight(tensor.to(self.dtype), self.backends[name]).items()}
        self.quantized_bytes += sum(value.nbytes for value in group.values())
        self.quantized_weights += tensor.numel()
        return group

    def config_changes(self) -> dict[str, Any]:
        """Entries of `config.json` that differ from the original's."""
        settings = self.config.to_dict()
        if self.config.bnb_4bit_compute_dtype == torch.float32:  # its default; stock would compute in float32
            settings["bnb_4bit_compute_dtype"] = str(self.dtype).removeprefix("torch.")
        return {"dtype": str(self.dtype).removeprefix("torch."), "quantization_config": settings}


def _read(matched: Mapping[str, StoredTensor], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the order of the files, some way ahead of the caller."""
    ordered = sorted(matched.items(), key=lambda item: (str(item[1].path), item[1].offset))
    slices = [TensorSlice(stored, 0, stored.numel) for _, stored in ordered]
    total = sum(piece.num_bytes for piece in slices)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Quantising") as progress:
        for (name, stored), values in zip(ordered, stream_slices(slices, device), strict=True):
            yield name, values.view(stored.shape)
            progress.update(stored.numel * stored.dtype.itemsize)
