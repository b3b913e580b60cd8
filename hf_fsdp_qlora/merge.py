"""Merge a saved adapter into its base model, one tensor at a time.

The base checkpoint is read and written shard by shard with the same file names, the same tensors in each file and the
same metadata. No model is ever built with real weights: a meta-device skeleton says which tensor belongs to which
module, and host memory stays at a few copies of the largest tensor. The result is an ordinary transformers folder.

Ordering: everything that can be wrong is checked before the first byte is written; all files go into a sibling folder
`<output>.incomplete`, its `config.json` last; one rename makes it the output. What was merged into what is written
down in `merge.json` inside the output.

Left out: pickle checkpoints, checkpoints that are already quantised, and adapters on weights that transformers
rebuilds from several tensors while loading (fused experts). All three are refused by name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_fsdp_qlora.base_checkpoint import BaseCheckpoint, open_base_checkpoint
from hf_fsdp_qlora.base_record import settle_record
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.quantization import QuantizationBackend, backend_for_config, skip_modules
from hf_fsdp_qlora.safetensors_stream import SafetensorsReader, SafetensorsWriter, TensorInfo
from hf_fsdp_qlora.saved_adapter import SavedAdapter, merge_bias, merge_low_rank, read_saved_adapter

logger = logging.getLogger(__name__)

REPORT_NAME = "merge.json"
TARGETS = ("original", "dequantized")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. `into` says in words which weights the adapter was added to."""

    output: str
    adapter: str
    base_model: str
    into: str
    num_low_rank: int
    num_replaced: int
    num_dequantized: int
    num_copied: int
    vocab_size: int | None
    untied_embeddings: bool


def merge_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    into: str = "original",
    quantization_config: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Write the base model with the adapter merged into it.

    Args:
        adapter: a PEFT adapter directory: LoRA, rsLoRA or DoRA, with `modules_to_save`, trained biases and resized
            embeddings.
        output: the folder to create. It must not exist or be empty.
        base_model: hub id or folder of the 16-bit base; by default what `adapter_config.json` names.
        into: "original" adds the adapter to the checkpoint's own weights. "dequantized" first quantises and
            dequantises each weight as training did, so that the result equals what the adapter was trained on.
        quantization_config: the config object that training used, for "dequantized"; None reads it from the record
            that this package keeps beside an adapter.
        dtype: dtype of the result, for all floating tensors; None keeps the checkpoint's. For "dequantized" it is the
            `dtype` of training: the record's, or where there is none, this.
        device: where the arithmetic runs ("cpu", "cuda"); tensors visit it one at a time.
        revision, token, trust_remote_code: of the base model, as `from_pretrained` takes them.

    Returns:
        A report, which is also written to `merge.json` in the output.

    Raises:
        ConfigError: the output is not empty, the adapter is of an unknown kind, an adapter tensor matches no base
            tensor, or the base cannot be merged into. Nothing is left behind.
    """
    target = Path(output)
    _check_request(target, into, quantization_config)
    saved = read_saved_adapter(Path(adapter))
    base = open_base_checkpoint(
        base_model or saved.config.get("base_model_name_or_path"),
        revision=revision, token=token, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    backend: QuantizationBackend | None = None
    quantized: set[str] = set()
    if into == "dequantized":
        record = settle_record(saved.path, quantization_config, dtype, base.dtype)
        dtype = record.dtype if base.parameter_dtypes() != {record.dtype} else dtype
        backend = backend_for_config(record.quantization_config, record.dtype)
        quantized = base.quantizable(skip_modules(record.quantization_config))
    plan = _Plan(base, saved, dtype, torch.device(device), backend, quantized)
    plan.check()
    unfinished = target.with_name(target.name + ".incomplete")
    if unfinished.exists():
        raise ConfigError(f"{unfinished} is left from an interrupted merge, or in use by another one. Remove it.")
    unfinished.mkdir(parents=True)
    try:
        plan.write_weights(unfinished)
        report = plan.report(target)
        (unfinished / REPORT_NAME).write_text(json.dumps(asdict(report), indent=2) + "\n")
        base.copy_side_files(unfinished, saved.path)
        base.write_config(unfinished, plan.config_changes())
        os.rename(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    logger.info("Merged %s into the %s weights of %s: %s", saved.path, into, base.name, target)
    return report


def _check_request(target: Path, into: str, quantization_config: Any) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"The output {target} exists and is not an empty folder. Choose another one or remove it.")
    if into not in TARGETS:
        raise ConfigError(f"into={into!r} is unknown; use one of {', '.join(TARGETS)}.")
    if into == "original" and quantization_config is not None:
        raise ConfigError("quantization_config has no effect with into='original'; drop it or use into='dequantized'.")


@dataclass(frozen=True)
class _Output:
    """One tensor of the result: its key, the base tensor it starts from, and the parameter it is."""

    key: str
    source: str
    parameter: str
    info: TensorInfo


class _Plan:
    """Which base tensors change and how. `quantized` names the modules whose weights training held in few bits."""

    def __init__(
        self, base: BaseCheckpoint, saved: SavedAdapter, dtype: torch.dtype | None, device: torch.device,
        backend: QuantizationBackend | None, quantized: set[str],
    ) -> None:  # fmt: skip
        self.base, self.saved, self.dtype, self.device = base, saved, dtype, device
        self.backend, self.quantized = backend, quantized
        self.untied = base.tied_head is not None and self._embeddings_diverge()
        self.files = {file: list(self._outputs(file)) for file in base.files}

    def check(self) -> None:
        """Raise ConfigError for adapter tensors without a base tensor and for shapes that cannot belong together."""
        outputs = [output for outputs in self.files.values() for output in outputs]
        known = {output.parameter: output.info for output in outputs}
        if self.base.tied_head is not None:
            known.setdefault(self.base.tied_head, known[self.base.embedding])
        modules = [f"{module}.weight" for module in self.saved.updates]
        biases = [f"{module}.bias" for module, update in self.saved.updates.items() if "bias" in update.keys]
        unknown = [name for name in [*modules, *biases, *self.saved.replacements] if name not in known]
        if unknown:
            raise ConfigError(
                f"The adapter {self.saved.path} has tensors for {', '.join(unknown[:8])}"
                f"{f' and {len(unknown) - 8} more' if len(unknown) > 8 else ''}, which match no tensor of the base "
                f"{self.base.name}. Give the base model that the adapter was trained on."
            )
        self.base.check_linear([module for module, update in self.saved.updates.items() if not update.is_embedding])
        for output in outputs:
            old, new = self.base.infos[output.source].shape, output.info.shape
            is_vocabulary = output.parameter in (self.base.embedding, self.base.head)
            if old != new and not (is_vocabulary and old[1:] == new[1:]):
                raise ConfigError(f"{output.parameter} has shape {new} in the adapter but {old} in the base.")
        # The shapes planned for the result: the adapter's where it replaces a tensor, the base's elsewhere.
        rows = {name: known[name].shape[0] for name in (self.base.embedding, self.base.head) if name in known}
        if len(set(rows.values())) > 1:
            raise ConfigError(f"Vocabulary rows would differ after merging: {rows}. The adapter must resize both.")

    def write_weights(self, folder: Path) -> None:
        """Write every shard, and the index if the base has one."""
        for file, outputs in self.files.items():
            with SafetensorsReader(self.base.folder / file) as reader:
                infos = {output.key: output.info for output in outputs}
                with SafetensorsWriter(folder / file, infos, reader.metadata) as writer:
                    for output in outputs:
                        if self._is_copy(output):
                            reader.copy_bytes(output.source, writer)
                        else:
                            writer.append(self._merged(output, reader))
        weight_map = {output.key: file for file, outputs in self.files.items() for output in outputs}
        self.base.write_index(folder, weight_map, [o.info for outputs in self.files.values() for o in outputs])

    def config_changes(self) -> dict[str, Any]:
        """Entries of `config.json` that differ from the base's."""
        changes: dict[str, Any] = {}
        if self._vocab_size() is not None:
            changes["vocab_size"] = self._vocab_size()
        if self.untied:
            changes["tie_word_embeddings"] = False
        if self.dtype is not None:
            changes["dtype"] = str(self.dtype).removeprefix("torch.")
        return changes

    def report(self, target: Path) -> MergeReport:
        """The report of a merge that was written."""
        outputs = [output for outputs in self.files.values() for output in outputs]
        low_rank = sum(self._module(output.parameter) in self.saved.updates for output in outputs)
        replaced = sum(output.parameter in self.saved.replacements for output in outputs)
        dequantized = sum(self._is_dequantized(output.parameter) for output in outputs)
        changed = sum(self._changes(output.parameter) for output in outputs)
        into = "the checkpoint's original weights"
        if self.backend is not None:
            into = f"the dequantised base: {dequantized} weights through {self.backend.spec}"
        return MergeReport(
            output=str(target), adapter=str(self.saved.path), base_model=self.base.name, into=into,
            num_low_rank=low_rank, num_replaced=replaced, num_dequantized=dequantized,
            num_copied=len(outputs) - changed, vocab_size=self._vocab_size(), untied_embeddings=self.untied,
        )  # fmt: skip

    def _outputs(self, file: str) -> Iterator[_Output]:
        for source in self.base.files[file]:
            parameter = self.base.parameter_names[source]
            yield self._output(source, source, parameter)
            head = self.base.tied_head
            if self.untied and head is not None and parameter == self.base.embedding:
                yield self._output(head, source, head)

    def _output(self, key: str, source: str, parameter: str) -> _Output:
        info = self.base.infos[source]
        dtype = self.dtype if self.dtype is not None and info.dtype.is_floating_point else info.dtype
        replacement = self.saved.replacements.get(parameter)
        shape = info.shape if replacement is None else self.saved.reader.tensors[replacement].shape
        return _Output(key, source, parameter, replace(info, dtype=dtype, shape=shape))

    def _merged(self, output: _Output, reader: SafetensorsReader) -> torch.Tensor:
        key = self.saved.replacements.get(output.parameter)
        tensor = reader.read(output.source) if key is None else self.saved.tensor(key)
        tensor = tensor.to(device=self.device, dtype=output.info.dtype)
        if self.backend is not None and self._is_dequantized(output.parameter):
            tensor = _through(self.backend, tensor)
        update = self.saved.updates.get(self._module(output.parameter))
        if update is not None and output.parameter.endswith(".weight"):
            tensor = merge_low_rank(tensor, update, self.saved)
        elif update is not None and "bias" in update.keys:
            tensor = merge_bias(tensor, update, self.saved)
        return tensor

    def _is_copy(self, output: _Output) -> bool:
        return not self._changes(output.parameter) and output.info.dtype == self.base.infos[output.source].dtype

    def _changes(self, parameter: str) -> bool:
        update = self.saved.updates.get(self._module(parameter))
        adds = update is not None and (parameter.endswith(".weight") or "bias" in update.keys)
        return adds or parameter in self.saved.replacements or self._is_dequantized(parameter)

    def _is_dequantized(self, parameter: str) -> bool:
        replaced = parameter in self.saved.replacements
        return self._module(parameter) in self.quantized and parameter.endswith(".weight") and not replaced

    def _module(self, parameter: str) -> str:
        return parameter.rpartition(".")[0]

    def _embeddings_diverge(self) -> bool:
        """Whether embedding and head, tied in the base, must be two tensors after the merge."""
        embedding, head = self.base.embedding, self.base.tied_head
        assert head is not None
        if not self._changes(embedding) and not self._changes(head):
            return False
        if any(self._module(name) in self.saved.updates for name in (embedding, head)):
            return True
        keys = [self.saved.replacements.get(name) for name in (embedding, head)]
        if keys[0] is None or keys[1] is None:
            return True
        return not torch.equal(self.saved.reader.read(keys[0]), self.saved.reader.read(keys[1]))

    def _vocab_size(self) -> int | None:
        key = self.saved.replacements.get(self.base.embedding)
        rows = None if key is None else self.saved.reader.tensors[key].shape[0]
        return rows if rows != self.base.config.get("vocab_size") else None


def _through(backend: QuantizationBackend, weight: torch.Tensor) -> torch.Tensor:
    """What training computed with in place of this weight."""
    codes, stats = backend.quantize(weight.reshape(-1), weight.numel(), lambda rows: rows)
    return backend.dequantize(codes, stats, (weight.shape[0], weight.shape[1]))
