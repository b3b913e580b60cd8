"""What a user can want from a run, as the wizard offers it. A new goal is a new entry of `GOALS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """One kind of run.

    Attributes:
        name: what `--goal` takes.
        title: what the menu shows.
        planner: the settings of `MemorySettings` that make it.
        recipe: the recipe keys that make it, beside those that every run has.
        has_adapter: whether LoRA is trained, so that the recipe has its keys.
        offloads: what can be kept in host memory, cheapest first.
        learning_rate: the peak of the schedule.
    """

    name: str
    title: str
    planner: Mapping[str, Any]
    recipe: Mapping[str, Any]
    has_adapter: bool = True
    offloads: tuple[str, ...] = ("base", "all")
    learning_rate: float = 2e-4


GOALS: Mapping[str, Goal] = {
    goal.name: goal
    for goal in (
        Goal(
            name="qlora",
            title="QLoRA: adapters over a 4-bit base (NF4); the least memory",
            planner={"method": "qlora"},
            recipe={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True},
        ),
        Goal(
            name="hqq",
            title="HQQ: adapters over a 4-bit base that HQQ's solver fits; slower to load",
            planner={"method": "qlora", "quant_format": "hqq"},
            recipe={"hqq_nbits": 4, "hqq_group_size": 64},
        ),
        Goal(
            name="lora",
            title="LoRA: adapters over the base in 16 bit",
            planner={"method": "lora"},
            recipe={"load_in_4bit": False},
            offloads=("all",),
        ),
        Goal(
            name="rotary",
            title="Rotary: all weights, a tenth at a time; the rest is parked in int8",
            planner={"method": "rotary", "active_fraction": 0.1},
            recipe={"rotary_active": "10%"},
            has_adapter=False,
            offloads=(),
            learning_rate=1e-5,
        ),
    )
}
