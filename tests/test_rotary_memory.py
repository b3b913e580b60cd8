"""What a rotation and a checkpoint take on top of what training holds anyway: every storage that lives is counted.

A model like a large one in small: embedding and head are most of what is active, and the optimizer steps in pieces.
On the CPU masters and kept moments are the device's memory too, so they are counted and taken out by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fsdp_qlora.rotary import active, moments, optimizer
from hf_fsdp_qlora.rotary.active import ActiveSet
from hf_fsdp_qlora.rotary.callback import RotaryCallback
from hf_fsdp_qlora.rotary.moments import Parts
from hf_fsdp_qlora.rotary.optimizer import RotaryOptimizer
from hf_fsdp_qlora.rotary.prepare import Rotary
from tests.living_bytes import LivingBytes
from tests.rotary_story import make_rotary_trainer
from tests.tiny_models import save_tiny_model

BF16 = torch.bfloat16
VOCABULARY, HIDDEN, PIECE = 4096, 64, 8192
EMBEDDING = VOCABULARY * HIDDEN
VISITS, STEPS = 4, 2
"""In a sweep, one block in each: the embedding, two layers, the head. And steps of a visit."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    return str(save_tiny_model(path, dtype=BF16, num_hidden_layers=2, vocab_size=VOCABULARY, hidden_size=HIDDEN))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small beside this embedding as the real ones beside a real one."""
    monkeypatch.setattr(optimizer, "PIECE_ELEMENTS", PIECE)
    monkeypatch.setattr(moments, "COMPRESS_ELEMENTS", PIECE)
    monkeypatch.setattr(active, "CHANGE_ELEMENTS", PIECE)


def living_bytes(rotary: Rotary) -> LivingBytes:
    """A count that begins with all that the run holds."""
    living = LivingBytes()
    states = [*rotary.callback.all_moments().values()]
    for value in (value for state in states for value in state.values()):
        for tensor in value.tensors if isinstance(value, Parts) else [value]:
            if isinstance(tensor, torch.Tensor):
                living.see(tensor)
    for tensor in [*rotary.model.parameters(), *rotary.model.buffers()]:
        living.see(tensor)
    for slice_ in rotary.active.slices.values():
        living.see(slice_.values)
    for _, master in rotary.masters.trained():
        living.see(master)
    living.peak = living.now()
    return living


def watch(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    model_path: str,
    folder: Path,
    *,
    rotary: dict[str, Any],
    **config: Any,
) -> list[tuple[int, int, int]]:
    """Train for two sweeps, the second of which has all masters from the first.

    Returns:
        For each call of the method when every block was trained once: the bytes that live before it, at most within
        it and after it, without those that came to the host in it.
    """
    settings: dict[str, Any] = {"active": 1, "steps_per_block": STEPS, "frozen": "int8", "order": "sequential"}
    trainer, prepared = make_rotary_trainer(
        model_path, str(folder), dtype=BF16, max_steps=2 * VISITS * STEPS, rotary={**settings, **rotary}, **config
    )
    inner = getattr(owner, method)
    seen: list[tuple[int, int, int]] = []

    def on_host() -> int:
        return prepared.masters.private_bytes + prepared.moments.num_bytes

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        if not prepared.masters.is_trained("lm_head.weight"):  # the last block of the first sweep
            inner(self, *args, **kwargs)
            return
        living = living_bytes(prepared)
        before, host = living.now(), on_host()
        with living:
            inner(self, *args, **kwargs)
        came = on_host() - host
        seen.append((before, living.peak - came, living.now() - came))

    monkeypatch.setattr(owner, method, watched)
    trainer.train()
    return seen


@pytest.mark.parametrize("master_dtype", ["float32", "bfloat16"])
def test_a_rotation_never_holds_more_than_before_or_after_it(
    model_path: str, tmp_path: Path, master_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves gives back its moments first. (They were joined before: 4.2 GB more for an embedding of 525M.)"""
    rotary = {"master_dtype": master_dtype}
    rotations = watch(monkeypatch, RotaryCallback, "_begin_visit", model_path, tmp_path, rotary=rotary)
    assert len(rotations) >= VISITS - 1
    assert all(most == max(before, after) for before, most, after in rotations)


@pytest.mark.parametrize("master_dtype", ["float32", "bfloat16"])
def test_activation_never_holds_more_than_after_it(
    model_path: str, tmp_path: Path, master_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parked embedding in 16 bit, and the rows of a layer, go before their successors come."""
    rotary = {"master_dtype": master_dtype}
    activations = watch(monkeypatch, ActiveSet, "activate", model_path, tmp_path, rotary=rotary)
    assert len(activations) >= VISITS - 1
    assert all(most == after for _, most, after in activations)


@pytest.mark.parametrize("bits", [32, 8])
def test_moments_are_kept_without_being_joined_on_the_device(
    model_path: str, tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On their way to the host they take the memory of a piece, and their codes once more while they are joined."""
    rotary = {"moments": "keep", "keep_bits": bits}
    leaving = watch(monkeypatch, RotaryOptimizer, "retire", model_path, tmp_path, rotary=rotary)
    assert len(leaving) >= VISITS - 1
    assert max(most - before for before, most, _ in leaving) <= 16 * PIECE + (bits == 8) * 1.1 * EMBEDDING


def test_a_checkpoint_takes_no_memory_for_moments(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after the embedding's first step: its moments go to the file a piece at a time."""
    steps = VISITS * STEPS + 1
    saves = watch(
        monkeypatch, Rotary, "save_checkpoint", model_path, tmp_path, rotary={}, save_strategy="steps",
        save_steps=steps,
    )  # fmt: skip
    assert saves
    assert all(most - before <= 16 * PIECE for before, most, _ in saves)
