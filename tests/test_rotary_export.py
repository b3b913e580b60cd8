"""The exported model: what stock transformers loads is the masters, from any number of ranks, in little memory."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_fsdp_qlora.checkpoint import find_checkpoint, index_checkpoint
from hf_fsdp_qlora.checkpoint_writer import CheckpointWriter
from hf_fsdp_qlora.matching import match_checkpoint
from hf_fsdp_qlora.rotary.export import export_model
from hf_fsdp_qlora.rotary.masters import Masters
from tests.distributed import run_distributed
from tests.tiny_models import ARCHITECTURES, save_tiny_model


def masters_of(model_path: Path, model: PreTrainedModel, rank: int = 0, world_size: int = 1) -> Masters:
    """Every second parameter trained: the checkpoint's value plus a thousandth of its position."""
    tensors = index_checkpoint(find_checkpoint(str(model_path)))
    stored, _ = match_checkpoint(model, model.state_dict(keep_vars=True), tensors)
    masters = Masters(stored, dtype=torch.float32, rank=rank, world_size=world_size)
    for name in list(masters.stored)[::2]:
        first, last = masters.slice_bounds(name)
        values = torch.empty(last - first)
        masters.load(name, values)
        masters.store(name, values + torch.arange(first, last) / 1000)
    return masters


def expected_of(model_path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    trained = set(list(masters_of(model_path, model).stored)[::2])
    return {
        name: (value + torch.arange(value.numel()).view(value.shape) / 1000 if name in trained else value).to(dtype)
        for name, value in model.state_dict().items()
    }


def assert_loads_as(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stock_transformers_loads_the_masters(name: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model", name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    export_model(model, masters_of(path, model), tmp_path / "out", dtype=torch.bfloat16)
    expected = expected_of(path, torch.bfloat16)
    if model.config.tie_word_embeddings:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    assert_loads_as(tmp_path / "out", expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_files_of_bounded_size_from_any_number_of_ranks(world_size: int, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model", shard_size="200KB")
    run_distributed(_export, path, tmp_path / "out", world_size=world_size)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert_loads_as(tmp_path / "out", expected_of(path, torch.float32))
    assert not list((tmp_path / "out").glob(".saving-*"))


def _export(path: Path, output: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    masters = masters_of(path, model, rank, ranks)
    export_model(model, masters, output, dtype=torch.float32, max_shard_bytes=200_000)


def test_an_older_export_of_another_form_is_replaced(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    masters = masters_of(path, model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("stays")
    for max_shard_bytes in (10**9, 200_000, 10**9):  # one file, several, one
        export_model(model, masters, tmp_path / "out", dtype=torch.float32, max_shard_bytes=max_shard_bytes)
        assert_loads_as(tmp_path / "out", expected_of(path, torch.float32))
        assert (tmp_path / "out" / "model.safetensors").exists() == (max_shard_bytes > 200_000)
    assert not list((tmp_path / "out").glob("model-*")) and (tmp_path / "out" / "tokenizer.json").exists()


def test_a_model_can_be_exported_over_its_own_checkpoint(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")
    expected = expected_of(path, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path)
    export_model(model, masters_of(path, model), path, dtype=torch.bfloat16)
    assert_loads_as(path, expected)


def test_a_full_disk_stops_every_rank_and_leaves_the_old_files(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    export_model(model, masters_of(path, model), tmp_path / "out", dtype=torch.float32)
    messages = run_distributed(_export_to_full_disk, path, tmp_path / "out")
    assert all("No space left" in message for message in messages)
    assert_loads_as(tmp_path / "out", expected_of(path, torch.float32))
    assert not list((tmp_path / "out").glob(".saving-*"))


def _export_to_full_disk(path: Path, output: Path) -> str:
    calls: list[int] = []

    def add(writer: Any, group: dict[str, torch.Tensor]) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises((OSError, RuntimeError)) as caught:
        patch.setattr(CheckpointWriter, "add", add)
        _export(path, output)
    return str(caught.value)


def test_exporting_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """Masters of 96 MB, all of them private; the largest parameter has 4 MB in float32."""
    path = save_tiny_model(tmp_path / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    [(masters_bytes, peak_bytes)] = run_distributed(_peak_of_export, path, tmp_path / "out", world_size=1)
    assert masters_bytes > 90 * 10**6
    assert peak_bytes < 24 * 10**6


def _peak_of_export(path: Path, output: Path) -> tuple[int, int]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    masters = masters_of(path, model)
    for name in masters.stored:
        first, last = masters.slice_bounds(name)
        masters.store(name, torch.ones(last - first))
    export_model(model, masters, output / "first", dtype=torch.bfloat16)  # imports, buffers of the allocator
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    export_model(model, masters, output / "second", dtype=torch.bfloat16)
    return masters.private_bytes, _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
