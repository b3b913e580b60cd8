"""Which blocks are active in which visit.

Visit v lasts `steps_per_block` steps. For the fixed orders its blocks are a pure function of the seed and v, so every
rank knows them without asking and no random state is saved. "importance" draws in proportion to a moving average of
gradient norms, which the caller reduces over ranks; averages and draws are in the checkpoint. A visit is drawn when it
is first asked for, one visit ahead where the next block is prefetched, and never again.

A sweep visits each rotating block once. The last visit of a sweep can be smaller than the others: blocks of the next
sweep do not fill it up, so that after every sweep all parameters have trained equally often.
"""

from __future__ import annotations

import math
import random
from typing import Any

from hf_fsdp_qlora.rotary.config import Order
from hf_fsdp_qlora.rotary.plan import Plan

AVERAGE_DECAY = 0.9
"""Of the moving averages, per observation."""


class Schedule:
    """The visits of a run.

    Args:
        plan: the blocks.
        order: see `RotaryConfig`.
        seed: of the random orders.
        coverage_floor: for "importance", the share of the average number of visits that every block gets.
    """

    def __init__(self, plan: Plan, *, order: Order, seed: int, coverage_floor: float) -> None:
        self.plan = plan
        self.order = order
        self.seed = seed
        self.coverage_floor = coverage_floor
        self._averages: dict[int, float] = {}
        self._visits: list[tuple[int, ...]] = []
        self._sweeps = 0

    def blocks_of_visit(self, visit: int) -> tuple[int, ...]:
        """Indices of the blocks that are active, those that always are included, in the order of the forward pass.

        Args:
            visit: from 0.
        """
        return tuple(sorted(self.plan.always + self._rotating(visit)))

    def observe(self, block: int, grad_norm: float) -> None:
        """Add a gradient norm, the same on every rank, to the moving average of a block."""
        before = self._averages.get(block, grad_norm)
        self._averages[block] = AVERAGE_DECAY * before + (1 - AVERAGE_DECAY) * grad_norm

    def visits_of_blocks(self, visits: int) -> dict[str, int]:
        """How often each block, by name, was active in the first `visits` visits."""
        counts = self._counts(visits)
        return {block.name: counts[index] for index, block in enumerate(self.plan.blocks)}

    def coverage(self, visits: int) -> float:
        """Share of the parameters that were active in one of the first `visits` visits at least."""
        counts = self._counts(visits)
        return self.plan.numel_of([index for index in counts if counts[index]]) / self.plan.numel

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: under "importance" the averages and the visits drawn so far."""
        if self.order != "importance":
            return {}
        return {
            "averages": {str(block): average for block, average in self._averages.items()},
            "visits": [list(blocks) for blocks in self._visits],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, from JSON too."""
        if self.order == "importance":
            self._averages = {int(block): average for block, average in state["averages"].items()}
            self._visits = [tuple(blocks) for blocks in state["visits"]]

    def _rotating(self, visit: int) -> tuple[int, ...]:
        while len(self._visits) <= visit:
            if self.order == "importance":
                self._visits.append(self._draw(len(self._visits)))
            else:
                self._visits += self.plan.visits(self._sweep(self._sweeps))
                self._sweeps += 1
        return self._visits[visit]

    def _sweep(self, sweep: int) -> list[int]:
        blocks = list(self.plan.rotating)
        if self.order == "reverse":
            blocks.reverse()
        elif self.order == "random":
            # Only random() itself is promised to be the same in every version of Python.
            drawn = random.Random(f"{self.seed}/{sweep}")
            blocks = sorted(blocks, key={block: drawn.random() for block in blocks}.__getitem__)
        return blocks

    def _draw(self, visit: int) -> tuple[int, ...]:
        """Blocks below the floor first, and those without a gradient norm yet; then in proportion to the averages.

        Source of the weighted draw without replacement: Efraimidis and Spirakis, 2006 (largest log(u) / weight).
        """
        counts = self._counts(visit)
        drawn = random.Random(f"{self.seed}/{visit}")
        each = sum(counts[block] for block in self.plan.rotating) / len(self.plan.rotating)

        def urgency(block: int) -> tuple[bool, float]:
            luck = 1 - drawn.random()  # above 0, up to 1
            average = self._averages.get(block)
            if average is None or counts[block] < self.coverage_floor * each:
                return True, luck - counts[block]
            return False, math.log(luck) / average if average > 0 else -math.inf

        keys = {block: urgency(block) for block in self.plan.rotating}
        return self.plan.take(sorted(keys, key=keys.__getitem__, reverse=True))

    def _counts(self, visits: int) -> dict[int, int]:
        counts = dict.fromkeys(range(len(self.plan.blocks)), 0)
        for visit in range(visits):
            for index in self.blocks_of_visit(visit):
                counts[index] += 1
        return counts
