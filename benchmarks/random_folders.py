"""Pre-quantised folders of large random models, made on the machine by the package's own streaming quantiser.

`quantize_random` feeds the quantiser one random tensor at a time, so the 16-bit model never exists. Where the values
of the layers do not matter, `write_folders` quantises one decoder layer and writes its bytes for all of them, from
several threads: the folder has the size, the names and the files of a real one in a fraction of the time. Folders for
several vocabularies share the layers' files; embedding, norm and head are in a file of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from launch import describe_machine
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from hf_fsdp_qlora.quantize_checkpoint import quantize_checkpoint
from hf_fsdp_qlora.safetensors_stream import SafetensorsReader, SafetensorsWriter, TensorInfo

WRITERS = 8
FIRST_LAYER = "model.layers.0."
OUTSIDE_FILE = "outside.safetensors"


def quantize_random(folder: Path, output: str, shape: dict[str, Any], vocab_size: int) -> Path:
    """NF4 with double quantisation of a random Llama, in `folder/output`.

    Args:
        folder: gets the config of the original too, in a folder of its own.
        shape: fields of `LlamaConfig`.
    """
    original = folder / f"{output}-original"
    original.mkdir()
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=4096, **shape)
    config.save_pretrained(original)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensors() -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(0)
        for name, parameter in model.state_dict().items():
            if parameter.dim() == 1:
                yield name, torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            else:
                yield name, torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)

    quantize_checkpoint(
        original,
        folder / output,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
        ),
        device=device,
        tensors=tensors(),
    )  # fmt: skip
    return folder / output


def write_models(folder: Path, shape: dict[str, Any], vocab_sizes: Sequence[int], distinct: bool) -> dict[int, Path]:
    """A quantised folder for each vocabulary, with the machine's name and the time it took printed.

    For a process of its own, whose CUDA context ends with it. A folder that was finished before is taken as it is.

    Args:
        distinct: quantise every layer from values of its own.
    """
    started = time.perf_counter()
    print(describe_machine(), flush=True)
    models: dict[int, Path] = {}
    for vocab_size in vocab_sizes:
        place = folder / f"{'distinct' if distinct else 'alike'}-{vocab_size}"
        done = place / "done"
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            made = (quantize_random(place, "nf4", shape, vocab_size) if distinct
                    else write_folders(place, shape, [vocab_size])[vocab_size])  # fmt: skip
            done.write_text(made.name)
        models[vocab_size] = place / done.read_text()
    size = sum(file.stat().st_size for model in models.values() for file in model.glob("*.safetensors"))
    print(f"{len(models)} folder(s), {size / 2**30:.2f} GiB, after {time.perf_counter() - started:.1f} s", flush=True)
    return models


def write_folders(folder: Path, shape: dict[str, Any], vocab_sizes: Sequence[int]) -> dict[int, Path]:
    """A quantised folder for each vocabulary, all layers with the bytes of one."""
    num_layers = shape["num_hidden_layers"]
    folders: dict[int, Path] = {}
    layer_files: list[Path] = []
    for vocab_size in vocab_sizes:
        one = quantize_random(folder, f"one-layer-{vocab_size}", shape | dict(num_hidden_layers=1), vocab_size)
        tensors = _read(one)
        layer = {name: value for name, value in tensors.items() if name.startswith(FIRST_LAYER)}
        outside = {name: value for name, value in tensors.items() if name not in layer}
        target = folders[vocab_size] = folder / f"vocabulary-{vocab_size}"
        target.mkdir()
        if not layer_files:
            layer_files = _write_layers(folder, layer, num_layers)
        _write(target / OUTSIDE_FILE, outside)
        weight_map = dict.fromkeys(outside, OUTSIDE_FILE)
        for index, file in enumerate(layer_files):
            os.link(file, target / file.name)
            weight_map |= dict.fromkeys(_of_layer(layer, index), file.name)
        config = json.loads((one / "config.json").read_text()) | dict(num_hidden_layers=num_layers)
        (target / "config.json").write_text(json.dumps(config))
        size = sum(value.numel() * value.itemsize for value in outside.values())
        index_json: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index_json))
        shutil.rmtree(one)
    return folders


def _write_layers(folder: Path, layer: dict[str, Tensor], num_layers: int) -> list[Path]:
    files = [folder / f"layer-{index:03d}.safetensors" for index in range(num_layers)]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(_write, files, (_of_layer(layer, index) for index in range(num_layers))))
    return files


def _of_layer(layer: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {f"model.layers.{index}." + name.removeprefix(FIRST_LAYER): value for name, value in layer.items()}


def _read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with SafetensorsReader(path) as reader:
            tensors |= {name: reader.read(name) for name in reader.tensors}
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    infos = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    with SafetensorsWriter(path, infos, {"format": "pt"}) as writer:
        for value in tensors.values():
            writer.append(value)
