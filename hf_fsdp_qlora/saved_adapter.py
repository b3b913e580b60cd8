"""What a saved PEFT adapter does to each weight of its base model, and the arithmetic that does it.

Merging must give PEFT's own numbers, so every step follows the order of types in `peft/tuners/lora/layer.py` and
`variants.py` (peft 0.21): adapters in 16 bit are widened to float32 first (PEFT does that when it loads them), the
scaled product is formed in float32, and only the sum is rounded to the dtype of the base weight. DoRA divides by the
row norms of that unrounded sum. Embedding adapters alone round the product before they add it.

Left out, and refused by name: adapter kinds other than LoRA, LoRA variants other than rsLoRA and DoRA, and
initialisations that change the base weights (PiSSA, OLoRA, LoftQ, ...), whose adapters only fit a changed base.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.safetensors_stream import SafetensorsReader

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<leaf>weight|bias))?$"
)
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Fields of LoraConfig that change what the saved tensors mean. An adapter that sets one is refused.
_UNSUPPORTED_FIELDS = (
    "fan_in_fan_out", "trainable_token_indices", "target_parameters", "layer_replication", "megatron_config",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "velora_config", "monteclora_config",
    "kasa_config",
)  # fmt: skip


@dataclass(frozen=True)
class LowRankUpdate:
    """The LoRA tensors of one module: their keys in the adapter file, and the factor on their product."""

    module: str
    scaling: float
    keys: dict[str, str] = field(repr=False)

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding_A" in self.keys


@dataclass(frozen=True)
class SavedAdapter:
    """A PEFT adapter directory that can be merged.

    Attributes:
        path: the directory.
        config: its `adapter_config.json`.
        reader: its weights.
        updates: LoRA tensors by module name, as the base model names its modules.
        replacements: base parameter name -> adapter key of the tensor that takes its place (`modules_to_save`,
            trained biases, resized embeddings).
    """

    path: Path
    config: dict[str, Any]
    reader: SafetensorsReader
    updates: dict[str, LowRankUpdate]
    replacements: dict[str, str]

    def tensor(self, key: str) -> torch.Tensor:
        """One adapter tensor in the dtype PEFT would compute with: 16-bit floats become float32."""
        tensor = self.reader.read(key)
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def read_saved_adapter(path: Path) -> SavedAdapter:
    """Read an adapter directory's configuration and the list of its tensors.

    Raises:
        ConfigError: files are missing, or the adapter is of a kind that cannot be merged.
    """
    for name in ("adapter_config.json", WEIGHTS_NAME):
        if not (path / name).is_file():
            raise ConfigError(f"{path} has no {name}; a PEFT adapter directory in safetensors format is needed.")
    config = json.loads((path / "adapter_config.json").read_text())
    _check_kind(path, config)
    reader = SafetensorsReader(path / WEIGHTS_NAME)
    parts: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for key in reader.tensors:
        if not key.startswith(_PREFIX):
            raise ConfigError(f"{path}: adapter tensor {key} does not start with {_PREFIX!r}; is this a LoRA adapter?")
        name = key[len(_PREFIX) :]
        match = _LORA_KEY.match(name)
        if match:
            leaf = "bias" if match["leaf"] == "bias" else match["part"]
            parts.setdefault(match["module"], {})[leaf] = key
        elif "original_module." not in name:
            # After resizing, PEFT writes a saved module twice; the entry under modules_to_save is the trained one.
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if plain not in replacements or ".modules_to_save." in name:
                replacements[plain] = key
    updates = {
        module: LowRankUpdate(module, _scaling(module, config, reader, keys), keys) for module, keys in parts.items()
    }
    return SavedAdapter(path, config, reader, updates, replacements)


def merge_low_rank(weight: torch.Tensor, update: LowRankUpdate, adapter: SavedAdapter) -> torch.Tensor:
    """Add one module's LoRA update to its weight, as PEFT's `merge_and_unload` does.

    Args:
        weight: (out_features, in_features), or (vocabulary, width) of an embedding; may be changed in place.

    Returns:
        The merged weight, same shape, dtype and device.

    Raises:
        ConfigError: the adapter's shapes do not fit the weight.
    """
    if update.is_embedding:
        return _merge_embedding(weight, update, adapter)
    lora_a = adapter.tensor(update.keys["lora_A"]).to(weight.device)
    lora_b = adapter.tensor(update.keys["lora_B"]).to(weight.device)
    _check_shape(update.module, weight, (lora_b.shape[0], lora_a.shape[1]))
    magnitude = None
    if "lora_magnitude_vector" in update.keys:
        magnitude = adapter.tensor(update.keys["lora_magnitude_vector"]).to(weight.device)
    for rows in _row_slices(weight):
        part = weight[rows]
        delta = (lora_b[rows] @ lora_a) * update.scaling
        if magnitude is None:
            part += delta
        else:
            norm = torch.linalg.norm(part + delta, dim=1)
            factor = (magnitude[rows] / norm).view(-1, 1)
            part.copy_(factor * (part + delta))
    return weight


def merge_bias(bias: torch.Tensor, update: LowRankUpdate, adapter: SavedAdapter) -> torch.Tensor:
    """Add the bias of `lora_B` (PEFT's `lora_bias=True`) to the layer's own bias, in place."""
    bias += adapter.tensor(update.keys["bias"]).to(bias.device) * update.scaling
    return bias


def _merge_embedding(weight: torch.Tensor, update: LowRankUpdate, adapter: SavedAdapter) -> torch.Tensor:
    lora_a = adapter.tensor(update.keys["lora_embedding_A"]).to(weight.device)
    lora_b = adapter.tensor(update.keys["lora_embedding_B"]).to(weight.device)
    _check_shape(update.module, weight, (lora_a.shape[1], lora_b.shape[0]))
    for rows in _row_slices(weight):
        delta = (lora_b @ lora_a[:, rows]).T * update.scaling
        weight[rows] += delta.to(weight.dtype)
    return weight


def _row_slices(weight: torch.Tensor) -> Iterator[slice]:
    """Equal slices of rows whose float32 copy stays small on the host. Equal, because matrix products of a handful
    of rows take another code path and round differently; of hundreds of rows they agree with the whole bit by bit."""
    budget_bytes = 2**27 if weight.device.type == "cpu" else 2**32
    pieces = math.ceil(weight.numel() * 4 / budget_bytes) or 1
    rows = math.ceil(weight.shape[0] / pieces)
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


def _check_shape(module: str, weight: torch.Tensor, needed: tuple[int, int]) -> None:
    if tuple(weight.shape) != needed:
        raise ConfigError(
            f"The adapter of {module} fits a weight of shape {needed}, but the base has {tuple(weight.shape)}. "
            "Merge into the base model that the adapter was trained on."
        )


def _check_kind(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{path} is a {kind} adapter; only LORA adapters (LoRA, rsLoRA, DoRA) can be merged.")
    unsupported = [name for name in _UNSUPPORTED_FIELDS if config.get(name)]
    if unsupported:
        raise ConfigError(
            f"{path}: merging does not support {', '.join(f'{name}={config[name]}' for name in unsupported)}. "
            "Use PEFT's merge_and_unload on the whole model instead."
        )
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise ConfigError(
            f"{path}: init_lora_weights={init!r} changed the base weights when training began, so the adapter does "
            "not fit the original ones. Convert it to plain LoRA first (save_pretrained with "
            "path_initial_model_for_weight_conversion), then merge."
        )


def _scaling(module: str, config: dict[str, Any], reader: SafetensorsReader, keys: dict[str, str]) -> float:
    needed = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in keys else ("lora_A", "lora_B")
    missing = [part for part in needed if part not in keys]
    if missing:
        raise ConfigError(f"The adapter's {module} has no {', '.join(missing)}; the adapter file is incomplete.")
    if "lora_embedding_A" in keys and "lora_magnitude_vector" in keys:
        raise ConfigError(f"The adapter's {module} is DoRA on an embedding, which merging does not support.")
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    saved = reader.tensors[keys[needed[0]]].shape[0]
    if saved != rank:
        raise ConfigError(
            f"The adapter's {module} has rank {saved}, but adapter_config.json says {rank}; the two files do not "
            "belong together."
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that ends the module's name, as `peft.utils.other.get_pattern_key` matches it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
