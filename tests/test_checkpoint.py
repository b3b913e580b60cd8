"""Reading byte ranges of safetensors, against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_fsdp_qlora import checkpoint
from hf_fsdp_qlora.checkpoint import TensorSlice, find_checkpoint, index_checkpoint, stream_slices
from hf_fsdp_qlora.errors import ConfigError
from tests.tiny_models import save_tiny_model


def test_slices_equal_the_library_whatever_the_lookahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path, shard_size="100KB")
    files = find_checkpoint(str(tmp_path))
    assert len(files) > 2
    stored = index_checkpoint(files)
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert stored.keys() == expected.keys()
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1000)
    for lookahead in (0, 5000, 10**9):
        monkeypatch.setattr(checkpoint, "LOOKAHEAD_BYTES", lookahead)
        slices = [TensorSlice(t, t.numel // 3, t.numel - 1) for t in stored.values()]
        slices += [TensorSlice(t, 5, 5) for t in stored.values()]  # a rank may own nothing of a tensor
        for piece, (name, values) in zip(
            slices, [*zip([*stored] * 2, stream_slices(slices, torch.device("cpu")), strict=True)], strict=True
        ):
            wanted = expected[name].flatten()[piece.start : piece.stop]
            assert values.dtype == wanted.dtype and torch.equal(values, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_slices_reach_a_gpu_unchanged(device: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, shard_size="100KB")
    slices = [TensorSlice(t, 0, t.numel) for t in index_checkpoint(find_checkpoint(str(tmp_path))).values()]
    for there, here in zip(
        stream_slices(slices, torch.device(device)), stream_slices(slices, torch.device("cpu")), strict=True
    ):
        assert there.is_cuda and torch.equal(there.cpu(), here)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    stored = index_checkpoint([path])["a"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="unexpected end of file"):
        list(stream_slices([TensorSlice(stored, 0, 1000)], torch.device("cpu")))


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="truncated: a ends at byte"):
        index_checkpoint([path])
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")
    with pytest.raises(ConfigError, match="git-lfs pointer"):
        index_checkpoint([path])
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ConfigError, match="dtype F4"):
        index_checkpoint([path])


def test_pickle_checkpoint_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="save_pretrained"):
        find_checkpoint(str(tmp_path))
