"""The recipe keys of rotary training: `rotary_active` turns it on, the others are fields of `RotaryConfig`.

Apart from that class, because reading a recipe must not import torch. A test compares the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RotaryArguments:
    """Settings of rotary training; `RotaryConfig` says more about each."""

    rotary_active: str | None = field(
        default=None,
        metadata={
            "help": "Train the whole model, a part of it at a time, in place of an adapter: so many blocks (2), a "
            "share of the parameters (10%%), or what fits into such memory (2GiB)."
        },
    )
    rotary_steps_per_block: int = field(default=50, metadata={"help": "Optimizer steps before the next blocks."})
    rotary_split: str = field(
        default="layer",
        metadata={
            "help": "Train a decoder layer as one block, or attention and MLP apart.",
            "choices": ["layer", "attention_mlp"],
        },
    )
    rotary_order: str = field(
        default="random",
        metadata={
            "help": "Of the blocks: random in each sweep, from the embedding up, from the head down, or by their "
            "gradient norms.",
            "choices": ["random", "sequential", "reverse", "importance"],
        },
    )
    rotary_always_active: list[str] = field(
        default_factory=lambda: ["norm"],
        metadata={"help": "Blocks that train in every step: any of embedding, head, norm."},
    )
    rotary_frozen: str = field(
        default="int8",
        metadata={
            "help": "Format of what is parked; bf16 means unquantised.",
            "choices": ["int8", "nf4", "bf16"],
        },
    )
    rotary_master_dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the weights on the host; bfloat16 rounds stochastically.",
            "choices": ["float32", "bfloat16"],
        },
    )
    rotary_moments: str = field(
        default="reset",
        metadata={"help": "Optimizer state of a parked block: dropped or kept.", "choices": ["reset", "keep"]},
    )
    rotary_keep_bits: int = field(default=32, metadata={"help": "Of kept optimizer states.", "choices": [32, 8]})
    rotary_warmup_steps: int = field(
        default=0, metadata={"help": "Steps over which the learning rate rises at the start of each visit."}
    )
    rotary_coverage_floor: float = field(
        default=0.5, metadata={"help": "With rotary_order importance: the share of visits below which no block falls."}
    )
    rotary_eval_masters: bool = field(
        default=False, metadata={"help": "Evaluate the masters too, beside the quantised model on the device."}
    )
