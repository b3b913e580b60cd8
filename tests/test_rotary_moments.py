"""Optimizer states of parked blocks: what 8 bits keep of them, and slices that are cut in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_fsdp_qlora.quantization.bitsandbytes import dynamic_map
from hf_fsdp_qlora.rotary import moments
from hf_fsdp_qlora.rotary.moments import Moments, Parts, gather_states, merge_states, split_state


def test_kept_moments_in_8_bit_are_close_and_never_lose_a_second_moment() -> None:
    generator = torch.Generator().manual_seed(0)
    numel = 2**17  # a whole number of rows of the 8-bit format
    first = torch.randn(numel, generator=generator) * 1e-4
    second = first.square() * torch.logspace(-6, 0, numel)
    store = Moments(bits=8)
    store.put("w", {"exp_avg": first, "exp_avg_sq": second, "step": torch.tensor(3.0)})
    assert store.num_bytes < 2.1 * numel
    zero = int((dynamic_map(torch.device("cpu")) == 0).nonzero())
    store.kept["w"]["exp_avg_sq/codes"][:, :10] = zero  # as a kernel rounds what is nothing beside its neighbours
    state = store.take("w", torch.device("cpu"))
    assert state["step"] == 3 and not store.kept
    assert float((state["exp_avg"] - first).norm() / first.norm()) < 0.02
    assert float((state["exp_avg_sq"].sqrt() - second.sqrt()).norm() / second.sqrt().norm()) < 0.03
    # A block's scale is its largest value: what was zeroed comes back as 5.5e-7 of it, not as nothing.
    lost = state["exp_avg_sq"].sqrt()[:10]
    assert lost.min() > 1e-7 * float(second[:128].sqrt().max()) and lost.max() < 1e-6 * float(
        second[:128].sqrt().max()
    )
    exact = Moments(bits=32)
    exact.put("w", {"exp_avg": first})
    assert torch.equal(exact.take("w", torch.device("cpu"))["exp_avg"], first)


@pytest.mark.parametrize("sizes", [[2304], [1024, 1024, 256]])
def test_states_of_8_bit_optimizers_are_kept_as_they_are(sizes: list[int]) -> None:
    """Their scales and code book are float32 vectors too; rounded at each visit, the code book would shrink."""
    numel = sum(sizes)
    book = dynamic_map(torch.device("cpu"))
    state: dict[str, Any] = {
        "state1": torch.arange(numel).to(torch.uint8),
        "absmax1": torch.rand(numel // 256),
        "qmap1": book,
        "step": 3,
    }
    store = Moments(bits=8)
    store.put("w", gather_states(split_state(state, sizes), sizes))
    kept = store.take("w", torch.device("cpu"))
    assert kept.keys() == state.keys() and kept["step"] == 3
    for key in ("state1", "absmax1", "qmap1"):
        assert torch.equal(kept[key], state[key]), key


def test_states_are_merged_and_split_exactly() -> None:
    """As bitsandbytes' 8-bit AdamW keeps them: codes, scales per 256 weights, a code book, a counter."""
    sizes = [512, 512, 300]
    pieces = [
        {"state1": torch.arange(n, dtype=torch.uint8), "absmax1": torch.rand(-(-n // 256)), "qmap1": torch.rand(256)}
        for n in sizes
    ]
    for piece in pieces:
        piece["qmap1"] = pieces[0]["qmap1"]
    whole = merge_states(pieces, sizes)
    assert [whole[key].numel() for key in ("state1", "absmax1", "qmap1")] == [1324, 6, 256]
    for piece, again in zip(pieces, split_state(whole, sizes), strict=True):
        assert all(torch.equal(again[key], value) for key, value in piece.items())


@pytest.mark.parametrize("bits", [8, 32])
def test_pieces_are_kept_as_the_whole_would_be(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces end where neither rows of the 8-bit format nor the runs that are compressed at once do."""
    sizes = [5120, 5120, 5120, 5120, 4001]
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(sum(sizes), generator=generator)
    whole = {"exp_avg": first, "exp_avg_sq": first.square(), "step": torch.tensor(3.0)}
    expected = Moments(bits)
    expected.put("w", whole)
    monkeypatch.setattr(moments, "COMPRESS_ELEMENTS", 8192)
    gathered = gather_states(split_state(whole, sizes), sizes)
    assert isinstance(gathered["exp_avg"], Parts)
    actual = Moments(bits)
    actual.put("w", gathered)
    assert actual.kept["w"].keys() == expected.kept["w"].keys()
    for key, value in expected.kept["w"].items():
        kept = actual.kept["w"][key]
        assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else kept == value, key
