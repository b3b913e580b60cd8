"""A base model's folder as a merge sees it: files, tensor names, embeddings, and everything beside the weights.

Names are the delicate part. Adapters name modules as the transformers class does; checkpoints may use other names,
which transformers translates while loading. A meta-device skeleton and transformers' own mapping bridge the two.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_fsdp_qlora.checkpoint import find_checkpoint
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.safetensors_stream import SafetensorsReader, TensorInfo

INDEX_NAME = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_OTHER_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
_SIDE_PATTERNS = ["*.json", "*.model", "*.txt", "*.py", "*.jinja", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class BaseCheckpoint:
    """A local safetensors checkpoint and what its model class says about it.

    Attributes:
        name: what the user called it.
        folder: where its files are.
        config: its `config.json`.
        files: its weight files, in order, and the tensors of each in the order of their bytes.
        infos: dtype, shape and place of every tensor.
        parameter_names: checkpoint key -> parameter name in the transformers model, for every tensor.
        dtype: what its config says it is to be loaded in; its embedding's where the config says nothing.
        embedding: parameter name of the input embedding.
        head: parameter name of the output head.
        tied_head: `head` where it is the embedding itself and has no tensor of its own, else None.
        skeleton: the model on the meta device.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    files: dict[str, list[str]]
    infos: dict[str, TensorInfo]
    parameter_names: dict[str, str]
    dtype: torch.dtype
    embedding: str
    head: str
    tied_head: str | None
    skeleton: Any

    def quantizable(self, skip_modules: list[str] | None) -> set[str]:
        """Names of the modules that training quantises, by the rule of `skeleton.replace_linears`."""
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module

        model = self.skeleton
        skip = HfQuantizer.get_modules_to_not_convert(model, skip_modules, model._keep_in_fp32_modules)
        return {
            name
            for name, module in model.named_modules()
            if type(module) is torch.nn.Linear
            and module is not model.get_output_embeddings()
            and should_convert_module(name, skip)
        }

    def parameter_dtypes(self) -> set[torch.dtype]:
        """Of the tensors that are parameters of the model; some checkpoints mix them, or hold tensors it ignores."""
        parameters = self.skeleton.state_dict()
        return {self.infos[key].dtype for key, name in self.parameter_names.items() if name in parameters}

    def check_linear(self, modules: list[str]) -> None:
        """Raise ConfigError for a LoRA module that is no plain linear layer (Conv1D stores its weight transposed)."""
        for name in modules:
            module = self.skeleton.get_submodule(name)
            if not isinstance(module, torch.nn.Linear):
                raise ConfigError(
                    f"The adapter changes {name}, a {type(module).__name__}; only linear layers and embeddings can be "
                    "merged shard by shard. Use PEFT's merge_and_unload on the whole model instead."
                )

    def write_index(self, folder: Path, weight_map: dict[str, str], infos: list[TensorInfo]) -> None:
        """Write the index of the merged shards, with the base's metadata and the new totals."""
        if not (self.folder / INDEX_NAME).is_file():
            return
        index = json.loads((self.folder / INDEX_NAME).read_text())
        metadata = index.get("metadata") or {}
        if "total_size" in metadata:
            metadata["total_size"] = sum(info.num_bytes for info in infos)
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(info.shape) for info in infos)
        index["weight_map"] = {key: weight_map[key] for key in sorted(weight_map)}
        (folder / INDEX_NAME).write_text(json.dumps({**index, "metadata": metadata}, indent=2, sort_keys=True) + "\n")

    def copy_side_files(self, folder: Path, adapter: Path) -> None:
        """Copy generation config, licence, code and tokenizer; the adapter's tokenizer if it has one of its own."""
        own_tokenizer = (adapter / "tokenizer_config.json").is_file()
        copy_side_files(self.folder, folder, tokenizer=adapter if own_tokenizer else self.folder)

    def write_config(self, folder: Path, changes: dict[str, Any]) -> None:
        """Write `config.json`: the base's bytes where nothing changed."""
        if not changes:
            _copy_if_there(self.folder / "config.json", folder)
            return
        config = {**self.config, **changes}
        if "dtype" in changes and "torch_dtype" in config:
            config["torch_dtype"] = changes["dtype"]
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def open_base_checkpoint(
    name: str | os.PathLike[str] | None, *, revision: str | None, token: str | None, trust_remote_code: bool
) -> BaseCheckpoint:
    """Find a checkpoint (downloading a hub id) and match its tensors to the parameters of its model class.

    Raises:
        ConfigError: there is no such folder, it holds no safetensors files, or its weights are already quantised.
    """
    if not name:
        raise ConfigError("The adapter names no base model; give one (base_model, or --base-model).")
    folder = local_folder(name, revision, token)
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise ConfigError(f"{name} is already quantised ({method}); merge into the 16-bit model it was made from.")
    files: dict[str, list[str]] = {}
    infos: dict[str, TensorInfo] = {}
    for path in find_checkpoint(str(name), revision=revision, token=token):
        with SafetensorsReader(path) as reader:
            infos |= reader.tensors
            files[path.name] = list(reader.tensors)
    skeleton = _skeleton(folder, trust_remote_code)
    names = _parameter_names(skeleton, list(infos))
    embedding = _name_of(skeleton, skeleton.get_input_embeddings())
    head = _name_of(skeleton, skeleton.get_output_embeddings())
    keys = {parameter: key for key, parameter in names.items()}
    if embedding not in keys:
        raise ConfigError(f"{name} has no tensor for {embedding}; its checkpoint is incomplete.")
    tied_head = head if skeleton.config.tie_word_embeddings and head not in keys else None
    return BaseCheckpoint(
        name=str(name), folder=folder, config=config, files=files, infos=infos, parameter_names=names,
        dtype=skeleton.config.dtype or infos[keys[embedding]].dtype, embedding=embedding, head=head,
        tied_head=tied_head, skeleton=skeleton,
    )  # fmt: skip


def copy_side_files(source: Path, target: Path, *, tokenizer: Path) -> None:
    """Copy generation config, licence and code, and the tokenizer from a folder that may be another one."""
    for name in (*_OTHER_FILES, *(path.name for path in source.glob("*.py"))):
        _copy_if_there(source / name, target)
    for name in _TOKENIZER_FILES:
        _copy_if_there(tokenizer / name, target)


def local_folder(name: str | os.PathLike[str], revision: str | None, token: str | None) -> Path:
    """The folder itself, or the hub cache's snapshot with everything but weights in it.

    Raises:
        ConfigError: there is no such folder and no such model on the hub.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=_SIDE_PATTERNS))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ConfigError(f"The base model {name} is neither a folder nor a model on the hub: {error}") from error


def _skeleton(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _parameter_names(skeleton: Any, keys: list[str]) -> dict[str, str]:
    """Checkpoint key -> parameter name. A tensor that becomes no parameter of its own keeps its key, so that it is
    copied, and an adapter that wants to change it is told that nothing matches."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    parameters = set(skeleton.state_dict())
    renamings = [entry for entry in get_model_conversion_mapping(skeleton) if isinstance(entry, WeightRenaming)]
    prefix = f"{skeleton.base_model_prefix}."
    names = {}
    for key in keys:
        name = key
        if name not in parameters:
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
        candidates = [name, prefix + name, name.removeprefix(prefix)]
        names[key] = next((candidate for candidate in candidates if candidate in parameters), key)
    return names


def _name_of(skeleton: Any, module: torch.nn.Module) -> str:
    return next(name for name, candidate in skeleton.named_modules() if candidate is module) + ".weight"


def _copy_if_there(path: Path, folder: Path) -> None:
    if path.is_file():
        shutil.copyfile(path, folder / path.name)
