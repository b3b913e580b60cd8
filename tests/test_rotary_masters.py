"""Masters: where they begin, what becomes a private copy, how ranks divide them, and rounding that loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_fsdp_qlora.checkpoint import StoredTensor, index_checkpoint
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.quantization import backend_for_config
from hf_fsdp_qlora.quantization.configs import BlockwiseFourBitConfig
from hf_fsdp_qlora.quantization.stored import PackedWeight
from hf_fsdp_qlora.rotary.masters import Masters, gather_whole, slice_bounds, stochastic_round
from tests.distributed import run_distributed

SHAPES = {"first": (7, 5), "second": (3,), "third": (160, 4), "long": (1300,), "one": (1,)}
CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def whole(masters: Masters, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    first, last = masters.slice_bounds(name)
    out = torch.empty(last - first, dtype=dtype)
    masters.load(name, out)
    return out


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_slices_of_all_ranks_are_the_checkpoint(file: Path, world_size: int) -> None:
    stored, expected = index_checkpoint([file]), load_file(file)
    ranks = [Masters(stored, dtype=torch.float32, rank=rank, world_size=world_size) for rank in range(world_size)]
    for name, value in expected.items():
        joined = torch.cat([whole(masters, name) for masters in ranks])
        assert torch.equal(joined, value.float().flatten())


@pytest.mark.parametrize("numel", [1, 255, 256, 257, 1300, 4096])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_slices_are_whole_blocks_in_equal_rooms(numel: int, world_size: int) -> None:
    stored = {"weight": StoredTensor(Path("unread"), 0, torch.float32, (numel,))}
    masters = Masters(stored, dtype=torch.float32, world_size=world_size)
    bounds = [slice_bounds(numel, rank, world_size) for rank in range(world_size)]
    assert bounds[0][0] == 0 and bounds[-1][1] == numel
    room = masters.padded_numel("weight") // world_size
    assert room * world_size == masters.padded_numel("weight") >= numel
    for rank, (first, last) in enumerate(bounds):
        assert first == min(rank * room, numel) and last == min((rank + 1) * room, numel)
        assert first % 256 == 0 or first == numel
    if world_size == 1:
        assert room == numel


def test_nothing_is_private_until_it_is_trained(file: Path) -> None:
    masters = Masters(index_checkpoint([file]), dtype=torch.float32)
    before = file.read_bytes()
    whole(masters, "first")
    assert masters.private_bytes == 0 and not masters.is_trained("first")
    values = torch.arange(35.0)
    masters.store("first", values)
    values.zero_()  # a copy, not an alias
    assert torch.equal(whole(masters, "first"), torch.arange(35.0))
    assert masters.private_bytes == 35 * 4
    assert [name for name, _ in masters.trained()] == ["first"]
    assert file.read_bytes() == before
    masters.forget()
    assert torch.equal(whole(masters, "first"), load_file(file)["first"].float().flatten())


def test_a_map_outlives_the_replacement_of_its_file(file: Path) -> None:
    masters = Masters(index_checkpoint([file]), dtype=torch.float32)
    expected = load_file(file)["third"].float().flatten().clone()
    whole(masters, "first")  # the file is mapped as a whole
    (file.parent / "new").write_bytes(b"something else")
    (file.parent / "new").rename(file)
    assert torch.equal(whole(masters, "third"), expected)


def test_values_of_another_dtype_are_not_rounded_in_silence(file: Path) -> None:
    masters = Masters(index_checkpoint([file]), dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="rounded"):
        masters.store("one", torch.ones(1))


def test_a_checkpoint_in_4_bits_is_refused(file: Path) -> None:
    stored = index_checkpoint([file])["third"]
    backend = backend_for_config(BlockwiseFourBitConfig(), torch.bfloat16)
    packed = PackedWeight(**vars(stored), backend=backend, parts=(stored,), absmax_offset=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="stores 1 weights in 4 bits"):
        Masters({"third": packed}, dtype=torch.float32)


def test_gathering_gives_every_rank_the_whole_parameter(file: Path) -> None:
    expected = load_file(file)
    for gathered in run_distributed(_gather, index_checkpoint([file]), world_size=3):
        for name, value in expected.items():
            trained = value.float() + 1 if name == "third" else value.float()
            assert torch.equal(gathered[name], trained)


def _gather(stored: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
    rank = torch.distributed.get_rank()
    masters = Masters(stored, dtype=torch.float32, rank=rank, world_size=3)
    masters.store("third", whole(masters, "third") + 1)
    return {name: gather_whole(masters, name, dtype=torch.float32, device=CPU) for name in SHAPES}


def test_stochastic_rounding_is_right_on_average() -> None:
    """2**20 draws of each: the mean of a two-valued variable with step s is within 5 * s / 2 / sqrt(2**20)."""
    generator = torch.Generator().manual_seed(0)
    for value in (1.0 + 2**-9, -3.3, 1e-30, 7.77e20):
        drawn = stochastic_round(torch.full((2**20,), value), generator)
        exact = torch.tensor(value)
        low, high = drawn.min(), drawn.max()
        assert low < exact < high and set(drawn.unique().tolist()) == {low.item(), high.item()}
        step = high.double() - low.double()
        assert abs(drawn.double().mean() - exact.double()) < 2.5 * step / 2**10


def test_stochastic_rounding_keeps_what_bfloat16_can_hold() -> None:
    every = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    numbers = every[~every.isnan()]
    generator = torch.Generator().manual_seed(0)
    rounded = stochastic_round(numbers.float(), generator)
    assert torch.equal(rounded.view(torch.int16), numbers.view(torch.int16))
    assert stochastic_round(torch.tensor([torch.nan, -torch.nan]), generator).isnan().all()
