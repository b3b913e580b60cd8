"""The run that a memory estimate is for: its settings, and what follows from them without knowing a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.formats import RowFormat, dense_rows, four_bit_rows, hqq_rows, int8_rows
from hf_fsdp_qlora.memory_visits import largest_visit_numel
from hf_fsdp_qlora.model_shape import ModelShape

GIB = 2**30
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
METHODS = ("qlora", "lora", "full", "rotary", "new_layers")
QUANT_FORMATS = ("nf4", "fp4", "int8", "hqq")
ENGINES = ("none", "ddp", "fsdp1", "fsdp2")
OFFLOADS = ("none", "base", "all")
ROTARY_FROZEN = ("int8", "nf4", "bf16")
OPTIMIZER_STATE_BYTES = {
    "adamw_torch_fused": 8, "adamw_torch": 8, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_32bit": 0,
    "paged_adamw_8bit": 0, "lion_32bit": 4, "lion_8bit": 1, "sgd": 0, "adafactor": 0,
}  # fmt: skip
"""Bytes on the GPU per trained parameter; paged states live in unified memory. Adafactor's factors are negligible."""
HQQ_BITS = 4
INT8_BLOCK = 128  # weights under one float32 scale, the default of the int8 config classes
FOUR_BIT_BLOCK = 64  # of bitsandbytes 4 bit, and hqq's default group


@dataclass(frozen=True)
class MemorySettings:
    """A run, as far as memory depends on it. The arguments of `estimate_memory`, which explains them."""

    method: str = "qlora"
    engine: str = "fsdp2"
    gpus: int = 1
    nodes: int = 1
    replicas: int = 1
    offload: str = "none"
    replicate_head: bool = False
    embedding_on_host: bool = False
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    quant_format: str = "nf4"
    block_size: int | None = None
    double_quant: bool = True
    prequantized: bool = False
    lora_r: int = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    optimizer: str = "adamw_torch_fused"
    batch_size: int = 1
    seq_len: int = 2048
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    activation_offloading: bool = False
    compile_layers: bool = False
    activation_budget: float | None = None
    padded: bool = False
    new_layers: int = 0
    active_fraction: float | None = None
    rotary_frozen: str = "int8"
    master_dtype: str = "float32"

    def __post_init__(self) -> None:
        choices = {
            "method": METHODS, "engine": ENGINES, "offload": OFFLOADS, "quant_format": QUANT_FORMATS,
            "rotary_frozen": ROTARY_FROZEN, "master_dtype": ("float32", "bfloat16"),
            "dtype": tuple(DTYPE_BYTES), "adapter_dtype": tuple(DTYPE_BYTES),
            "optimizer": tuple(OPTIMIZER_STATE_BYTES),
        }  # fmt: skip
        problems = [
            f"{name}={getattr(self, name)!r} is unknown to the planner; use one of {', '.join(allowed)}."
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]
        for name in ("gpus", "nodes", "replicas", "lora_r", "batch_size", "seq_len", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 1.")
        if self.engine == "none" and self.gpus * self.nodes > 1:
            problems.append(f"engine='none' is one GPU, got {self.gpus * self.nodes}; use fsdp2 or ddp.")
        if self.offload != "none" and not self.engine.startswith("fsdp"):
            problems.append(f"offload={self.offload!r} needs FSDP, got engine={self.engine!r}.")
        if self.activation_offloading and not self.gradient_checkpointing:
            problems.append(
                "activation_offloading without gradient_checkpointing is unknown to the planner; set both."
            )
        problems += self._problems_of_compiling()
        if self.replicas > 1 and (self.engine != "fsdp2" or self.world_size % self.replicas):
            problems.append(f"replicas={self.replicas} needs FSDP2 and a number of GPUs that it divides.")
        whole = [name for name in ("replicate_head", "embedding_on_host") if getattr(self, name)]
        if whole and (self.engine != "fsdp2" or not self.has_adapters):
            problems.append(f"{whole[0]} needs FSDP2 and adapters, got {self.engine!r} and method={self.method!r}.")
        if self.prequantized and (self.method != "qlora" or self.quant_format not in ("nf4", "fp4")):
            problems.append(
                "prequantized folders are in bitsandbytes 4 bits: method='qlora', quant_format 'nf4' or 'fp4'."
            )
        if (self.method == "new_layers") != (self.new_layers > 0):
            problems.append(f"method={self.method!r} with new_layers={self.new_layers}; set both or neither.")
        if problems:
            raise ConfigError("\n".join(problems))

    def _problems_of_compiling(self) -> list[str]:
        budget = self.activation_budget
        problems = []
        if budget is not None and not (self.compile_layers and 0 <= budget <= 1):
            problems.append(f"activation_budget={budget} needs compile_layers, and 0 to 1.")
        if self.compile_layers and self.engine.startswith("fsdp"):
            problems.append(f"compile_layers is for one GPU or DDP, got engine={self.engine!r}.")
        if self.compile_layers and (not self.has_adapters or self.lora_dropout or self.activation_offloading):
            problems.append(
                "compile_layers is known to the planner with LoRA without dropout or activation_offloading only, got "
                f"method={self.method!r}, lora_dropout={self.lora_dropout}."
            )
        return problems

    @property
    def world_size(self) -> int:
        return self.gpus * self.nodes

    @property
    def shards(self) -> int:
        """Into how many parts parameters are cut."""
        return self.world_size // self.replicas if self.engine.startswith("fsdp") else 1

    @property
    def row_block(self) -> int:
        """Quantised weights under one scale."""
        quant_format = self.rotary_frozen if self.method == "rotary" else self.quant_format
        default = INT8_BLOCK if quant_format == "int8" else FOUR_BIT_BLOCK
        return default if self.method == "rotary" else self.block_size or default

    @property
    def trains_head(self) -> bool:
        """Whether the head has a gradient in every step."""
        return self.method == "full" or bool({"lm_head", "embed_out"} & set(self.modules_to_save))

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA is what is trained."""
        return self.method in ("qlora", "lora")


def trainable_parameters(shape: ModelShape, settings: MemorySettings) -> int:
    """Parameters that the optimizer sees; in rotary training at most at a time."""
    if settings.method == "full":
        return shape.total_numel
    if settings.method == "rotary":
        return largest_visit_numel(shape, settings.active_fraction)
    if settings.method == "new_layers":
        return settings.new_layers * shape.layer_numel
    counts = shape.targeted(settings.target_modules)
    lora = sum(counts.get(x.name, 0) * settings.lora_r * (x.in_features + x.out_features) for x in shape.linears)
    return lora + _saved_numel(shape, settings.modules_to_save)


def whole_numel(shape: ModelShape, settings: MemorySettings) -> tuple[int, int]:
    """Frozen parameters that are not sharded: of the tail (head and final norm), whole on every rank; and of the input
    embedding, in host memory.

    Raises:
        ConfigError: they are tied or trained.
    """
    if not (settings.replicate_head or settings.embedding_on_host):
        return 0, 0
    embedding = {"embed_tokens", "embed_in"} & set(settings.modules_to_save)
    if not shape.head_numel:
        raise ConfigError("replicate_head and embedding_on_host need a head that is not tied to the embedding.")
    if (settings.replicate_head and settings.trains_head) or (settings.embedding_on_host and embedding):
        raise ConfigError(f"modules_to_save={list(settings.modules_to_save)} trains what would not be sharded.")
    tail = shape.head_numel + shape.outside_other_numel if settings.replicate_head else 0
    return tail, shape.embedding_numel if settings.embedding_on_host else 0


def row_format(settings: MemorySettings) -> RowFormat | None:
    """How linear weights are stored; None where they keep their dtype."""
    quant_format = settings.quant_format
    if settings.method == "rotary":
        quant_format = settings.rotary_frozen
        if quant_format == "bf16":
            return dense_rows(DTYPE_BYTES[settings.dtype])
    if settings.method in ("lora", "full") or quant_format == "bf16":
        return None
    if quant_format == "int8":
        return int8_rows(settings.row_block)
    if quant_format == "hqq":
        return hqq_rows(HQQ_BITS, settings.row_block, DTYPE_BYTES[settings.dtype])
    return four_bit_rows(settings.row_block, settings.double_quant)


def _saved_numel(shape: ModelShape, modules: Sequence[str]) -> int:
    sizes = {"embed_tokens": shape.embedding_numel, "embed_in": shape.embedding_numel}
    sizes |= dict.fromkeys(("lm_head", "embed_out"), shape.head_numel or shape.embedding_numel)
    unknown = [name for name in modules if name not in sizes]
    if unknown:
        raise ConfigError(f"modules_to_save={unknown} is unknown to the planner; it knows {', '.join(sizes)}.")
    return sum(sizes[name] for name in modules)
