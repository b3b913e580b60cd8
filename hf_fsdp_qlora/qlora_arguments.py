"""The recipe keys that upstream's dataclasses lack, but for rotary training's (rotary_arguments.py)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class QLoraArguments:
    """What TRL's `ScriptArguments`, `SFTConfig` and `ModelConfig` have no field for."""

    fsdp_engine: str = field(
        default="auto",
        metadata={
            "help": "How load_model shards: auto reads what accelerate launch set.",
            "choices": ["auto", "fsdp2", "fsdp1", "none"],
        },
    )
    precision: str | None = field(
        default=None,
        metadata={
            "help": "A preset for every dtype of the run: dtype, adapter_dtype, bf16, and those that FSDP stores and "
            "reduces in. Leave these keys out then.",
            "choices": ["bf16_fp32_adapters", "bf16_fp32_reduce", "bf16", "fp32_autocast", "fp32", "fp16"],
        },
    )
    offload: str | None = field(
        default=None,
        metadata={
            "help": "What stays in host memory: the quantised rows (base) or every parameter (all). By default what "
            "the accelerate config's fsdp_offload_params says.",
            "choices": ["none", "base", "all"],
        },
    )
    offload_pin_memory: bool = field(
        default=True,
        metadata={
            "help": "Pin what is offloaded, for faster copies. False where locked memory is limited; FSDP2 only."
        },
    )
    replicate_head: bool = field(
        default=False,
        metadata={
            "help": "Keep the frozen head and final norm whole on every rank (FSDP2): less memory at the peak of a "
            "step with a large vocabulary and few ranks."
        },
    )
    embedding_on_host: bool = field(
        default=False,
        metadata={
            "help": "Keep the frozen, untied input embedding whole in host memory and look ids up there (FSDP2)."
        },
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "A saved adapter to continue from (hub id or folder) instead of a new one."}
    )
    adapter_dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the adapter's master weights.", "choices": ["float32", "bfloat16"]},
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "Compile each decoder layer: slow first steps, faster ones after them. Not under FSDP."},
    )
    checkpoint_layers: int | None = field(
        default=None,
        metadata={
            "help": "With gradient_checkpointing, recompute only so many decoder layers and let the others keep their "
            "activations: less time for more memory. By default all are recomputed."
        },
    )
    activation_budget: float | None = field(
        default=None,
        metadata={
            "help": "With compile_layers, let the compiler recompute inside each layer in place of "
            "gradient_checkpointing: 0 keeps as little, 1 all that is expensive to compute."
        },
    )
    train_new_layers: bool = field(
        default=False,
        metadata={
            "help": "Train the layers that `hf-fsdp-qlora expand` added, whole and unquantised, in place of LoRA. "
            "The model must be its output."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={"help": "LoRA+ (arXiv 2402.12354): learning rate of LoRA B over that of LoRA A, 16 in the paper."},
    )
    bnb_4bit_blocksize: int = field(
        default=64, metadata={"help": "Weights under one absmax in 4-bit formats; transformers only knows 64."}
    )
    int8_type: str | None = field(
        default=None,
        metadata={
            "help": "8-bit rows in place of load_in_4bit: linear (integers and a scale per block, 0.65 %% error) or "
            "dynamic (bitsandbytes' 8-bit floats, 1.02 %%). load_in_8bit is LLM.int8, which cannot be sharded.",
            "choices": ["linear", "dynamic"],
        },
    )
    int8_block_size: int = field(default=128, metadata={"help": "Weights under one scale with int8_type."})
    hqq_nbits: int | None = field(
        default=None,
        metadata={"help": "HQQ in place of load_in_4bit, with so many bits (HqqConfig).", "choices": [8, 4, 3, 2]},
    )
    hqq_group_size: int = field(
        default=64, metadata={"help": "Weights under one scale and zero with hqq_nbits, a multiple of 8."}
    )
    hqq_axis: int = field(
        default=1,
        metadata={
            "help": "Along which axis hqq_nbits groups weights: 1, or 0 (more exact for few bits, slower).",
            "choices": [1, 0],
        },
    )
    verify_weights: bool = field(
        default=True,
        metadata={"help": "Check before the first step that gathered weights are byte-equal to what was loaded."},
    )
    dataset_format: str | None = field(
        default=None,
        metadata={
            "help": "Convert the data set first: alpaca turns instruction, input, output into prompt, completion.",
            "choices": ["alpaca"],
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Evaluation data (hub name, file or folder) when dataset_name has no dataset_test_split."},
    )
