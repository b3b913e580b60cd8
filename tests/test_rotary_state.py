"""The state in a checkpoint: exact on as many ranks, divided exactly on others, whole or absent on the disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_fsdp_qlora.checkpoint import StoredTensor, index_checkpoint
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.rotary.masters import Masters, slice_bounds
from hf_fsdp_qlora.rotary.moments import Moments, Parts
from hf_fsdp_qlora.rotary.state import load_state, save_state
from hf_fsdp_qlora.safetensors_stream import SafetensorsWriter
from tests.distributed import run_distributed

SIZES = {"long": 6000, "short": 300, "tiny": 3, "never": 700}
ROTATION = {"visit": 3, "averages": {"0": 0.1 + 0.2}, "order": [[1, 2], [0]]}


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, StoredTensor]:
    tensors = {name: torch.arange(size, dtype=torch.float32).to(torch.bfloat16) for name, size in SIZES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return index_checkpoint([tmp_path / "model.safetensors"])


def values_of(name: str, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SIZES[name])
    return torch.randn(SIZES[name], generator=generator) * scale


def blocks_of(name: str) -> torch.Tensor:
    """What bitsandbytes keeps per 256 weights."""
    return torch.arange(-(-SIZES[name] // 256), dtype=torch.float32) + 1


def divided(stored: dict[str, StoredTensor], rank: int, world_size: int) -> tuple[Masters, dict[str, dict[str, Any]]]:
    """What one of several ranks has: all but "never" trained; 32-bit, 8-bit and no optimizer states."""
    masters = Masters(stored, dtype=torch.float32, rank=rank, world_size=world_size)
    moments: dict[str, dict[str, Any]] = {}
    first, last = masters.slice_bounds("long")
    masters.store("long", values_of("long", 0.5)[first:last])
    masters.put_aside("long")  # two blocks in the middle of a visit: their second, and their first
    masters.put_aside("short")
    for name in ("long", "short", "tiny"):
        first, last = masters.slice_bounds(name)
        masters.store(name, values_of(name)[first:last])
    first, last = masters.slice_bounds("short")
    if first < last:
        moments["short"] = {"exp_avg": values_of("short", 0.1)[first:last], "step": torch.tensor(7.0)}
    first, last = masters.slice_bounds("long")
    if first < last:
        codes = (torch.arange(SIZES["long"]) % 251).to(torch.uint8)
        moments["long"] = {
            "state1": codes[first:last], "absmax1": blocks_of("long")[first // 256 : -(-last // 256)],
            "qmap1": torch.linspace(-1, 1, 256), "step": 9,
        }  # fmt: skip
    return masters, moments


def save_on(stored: dict[str, StoredTensor], folder: Path, world_size: int) -> None:
    run_distributed(_save, stored, folder, world_size=world_size)


def _save(stored: dict[str, StoredTensor], folder: Path) -> None:
    masters, moments = divided(stored, torch.distributed.get_rank(), torch.distributed.get_world_size())
    save_state(folder, masters, moments, ROTATION)


def assert_same_state(actual: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    assert actual.keys() == expected.keys()
    for name, state in expected.items():
        assert actual[name].keys() == state.keys()
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(actual[name][key], value) and actual[name][key].dtype == value.dtype, (name, key)
            else:
                assert actual[name][key] == value and type(actual[name][key]) is type(value), (name, key)


def assert_same_masters(actual: Masters, expected: Masters) -> None:
    assert [name for name, _ in actual.trained()] == [name for name, _ in expected.trained()]
    for (name, own), (_, value) in zip(actual.trained(), expected.trained(), strict=True):
        assert torch.equal(own, value), name
    assert [name for name, _ in actual.starts()] == [name for name, _ in expected.starts()]
    for (name, own), (_, value) in zip(actual.starts(), expected.starts(), strict=True):
        assert torch.equal(own, value), name


@pytest.mark.parametrize(("saved_by", "read_by"), [(1, 1), (3, 3), (1, 2), (2, 1), (2, 3), (3, 2), (5, 2), (2, 5)])
def test_state_comes_back_on_any_number_of_ranks(
    saved_by: int, read_by: int, stored: dict[str, StoredTensor], tmp_path: Path
) -> None:
    save_on(stored, tmp_path / "checkpoint-1", saved_by)
    for rank in range(read_by):
        expected_masters, expected_moments = divided(stored, rank, read_by)
        masters = Masters(stored, dtype=torch.float32, rank=rank, world_size=read_by)
        first, last = masters.slice_bounds("never")
        masters.put_aside("never")  # trained since, in a run that goes back
        masters.store("never", torch.zeros(last - first))
        moments, rotation = load_state(tmp_path / "checkpoint-1", masters)
        assert rotation == ROTATION
        assert_same_masters(masters, expected_masters)
        assert_same_state(moments, expected_moments)


def test_compressed_moments_are_bit_exact_on_the_same_number_of_ranks(
    stored: dict[str, StoredTensor], tmp_path: Path
) -> None:
    kept = Moments(bits=8)
    kept.put("long", {"exp_avg": values_of("long"), "exp_avg_sq": values_of("long").square(), "step": 5.0})
    save_state(tmp_path, Masters(stored, dtype=torch.float32), kept.kept, ROTATION)
    again = Moments(bits=8)
    again.kept, _ = load_state(tmp_path, Masters(stored, dtype=torch.float32))
    cpu = torch.device("cpu")
    expected = kept.take("long", cpu)
    assert_same_state({"long": again.take("long", cpu)}, {"long": expected})
    assert abs(expected["exp_avg"] - values_of("long")).max() > 0, "nothing was compressed"


def test_compressed_moments_are_expanded_and_divided(stored: dict[str, StoredTensor], tmp_path: Path) -> None:
    kept = Moments(bits=8)
    kept.put("long", {"exp_avg": values_of("long"), "step": 5.0})
    save_state(tmp_path, Masters(stored, dtype=torch.float32), kept.kept, ROTATION)
    expected = kept.take("long", torch.device("cpu"))["exp_avg"]
    for rank in range(2):
        moments, _ = load_state(tmp_path, Masters(stored, dtype=torch.float32, rank=rank, world_size=2))
        first, last = slice_bounds(SIZES["long"], rank, 2)
        assert_same_state(moments, {"long": {"exp_avg": expected[first:last], "step": 5.0}})


def test_states_of_different_forms_are_not_joined(
    stored: dict[str, StoredTensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """bitsandbytes keeps slices below 4,096 weights in float32, so the last rank's can differ from the others'."""
    run_distributed(_save_mixed, stored, tmp_path)
    moments, _ = load_state(tmp_path, Masters(stored, dtype=torch.float32))
    assert moments.keys() == {"short"}
    assert "optimizer state of long cannot be divided" in caplog.text


def _save_mixed(stored: dict[str, StoredTensor], folder: Path) -> None:
    rank = torch.distributed.get_rank()
    masters, moments = divided(stored, rank, 2)
    if rank == 1:
        moments["long"] = {"state1": torch.zeros(len(moments["long"]["state1"])), "step": 9}
    save_state(folder, masters, moments, ROTATION)


def test_a_state_in_parts_is_saved_as_one(stored: dict[str, StoredTensor], tmp_path: Path) -> None:
    masters, moments = divided(stored, 0, 1)
    state = moments["long"]
    parts = {key: Parts(state[key].split(sizes)) for key, sizes in (("state1", 2048), ("absmax1", 8))}
    save_state(tmp_path / "whole", masters, moments, ROTATION)
    save_state(tmp_path / "parts", masters, {**moments, "long": {**state, **parts}}, ROTATION)
    file = "rotary/rank-00000-of-00001.safetensors"
    assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_masters_in_bfloat16(stored: dict[str, StoredTensor], tmp_path: Path) -> None:
    masters = Masters(stored, dtype=torch.bfloat16)
    masters.store("tiny", torch.tensor([1.0, 2.5, -3.0]).bfloat16())
    save_state(tmp_path, masters, {}, {})
    again = Masters(stored, dtype=torch.bfloat16)
    load_state(tmp_path, again)
    assert_same_masters(again, masters)
    with pytest.raises(ConfigError, match="torch.bfloat16 masters, this run torch.float32"):
        load_state(tmp_path, Masters(stored, dtype=torch.float32))


def test_files_of_another_number_of_ranks_are_replaced(stored: dict[str, StoredTensor], tmp_path: Path) -> None:
    save_on(stored, tmp_path, 3)
    save_on(stored, tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "rotary").iterdir()) == [
        "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors", "state.json",
    ]  # fmt: skip


def test_a_state_of_another_model_is_refused(stored: dict[str, StoredTensor], tmp_path: Path) -> None:
    save_state(tmp_path, Masters(stored, dtype=torch.float32), {}, {})
    other = {name: tensor for name, tensor in stored.items() if name != "tiny"}
    masters = Masters(other, dtype=torch.float32)
    masters.store("short", values_of("short"))
    with pytest.raises(ConfigError, match="another model: tiny"):
        load_state(tmp_path, masters)
    assert masters.is_trained("short"), "masters were dropped before the checkpoint was found to be wrong"
    with pytest.raises(ConfigError, match="cut short"):
        load_state(tmp_path / "nothing", masters)


@pytest.mark.parametrize("tensors_written", [0, 2, 5])
def test_a_process_killed_while_saving_leaves_no_state_that_could_be_read(
    tensors_written: int, stored: dict[str, StoredTensor], tmp_path: Path
) -> None:
    masters, moments = divided(stored, 0, 1)
    save_state(tmp_path / "checkpoint-1", masters, moments, ROTATION)
    for folder in ("checkpoint-2", "checkpoint-1"):  # a new one, and one over an older one of that step
        process = multiprocessing.get_context("forkserver").Process(
            target=_save_and_die, args=(stored, tmp_path / folder, tensors_written)
        )
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        if folder == "checkpoint-2":
            again = Masters(stored, dtype=torch.float32)
            assert_same_state(load_state(tmp_path / "checkpoint-1", again)[0], moments)
            assert_same_masters(again, masters)
        with pytest.raises(ConfigError, match="cut short"):
            load_state(tmp_path / folder, Masters(stored, dtype=torch.float32))
        save_state(tmp_path / folder, masters, moments, ROTATION)  # what the killed one left is no obstacle
        assert load_state(tmp_path / folder, Masters(stored, dtype=torch.float32))[1] == ROTATION
        assert not list((tmp_path / folder / "rotary").glob("*.tmp"))


def _save_and_die(stored: dict[str, StoredTensor], folder: Path, tensors_written: int) -> None:
    append, count = SafetensorsWriter.append, iter(range(100))

    def append_or_die(writer: SafetensorsWriter, tensor: torch.Tensor) -> None:
        if next(count) == tensors_written:
            os.kill(os.getpid(), signal.SIGKILL)
        append(writer, tensor)

    setattr(SafetensorsWriter, "append", append_or_die)  # noqa: B010  (in a process of its own)
    save_state(folder, *divided(stored, 0, 1), ROTATION)


def test_the_description_is_written_last(stored: dict[str, StoredTensor], tmp_path: Path) -> None:
    """One rank of two fails: the folder has its file and the other's temporary one, and no state."""
    messages = run_distributed(_save_but_one, stored, tmp_path)
    assert all("disk" in message for message in messages)
    names = {path.name for path in (tmp_path / "rotary").iterdir()}
    assert "rank-00000-of-00002.safetensors" in names and "state.json" not in names


def _save_but_one(stored: dict[str, StoredTensor], folder: Path) -> str:
    rank = torch.distributed.get_rank()

    def append(writer: SafetensorsWriter, tensor: torch.Tensor) -> None:
        raise OSError("the disk is gone")

    masters, moments = divided(stored, rank, 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises((OSError, RuntimeError)) as caught:
        if rank == 1:
            patch.setattr(SafetensorsWriter, "append", append)
        save_state(folder, masters, moments, ROTATION)
    return str(caught.value)


def test_rotation_survives_json(stored: dict[str, StoredTensor], tmp_path: Path) -> None:
    save_state(tmp_path, Masters(stored, dtype=torch.float32), {}, ROTATION)
    assert json.loads((tmp_path / "rotary" / "state.json").read_text())["rotation"] == ROTATION
