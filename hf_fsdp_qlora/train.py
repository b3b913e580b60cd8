"""The parts of a training script that are not about the model: recipe, tokenizer, data, resuming, logging.

`recipes/sft.py` shows the order. The tokenizer comes before the model, because a chat template can add tokens and the
embeddings of a sharded model cannot be resized; the data comes before the model too, so that a wrong column costs
seconds and not the load of a large checkpoint.

Heavy imports are inside the functions: the command line reads this module's neighbours without them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fsdp_qlora.config import Recipe, load_recipe, parse_command_line
from hf_fsdp_qlora.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
    from trl import SFTConfig

    from hf_fsdp_qlora.expand import Expansion

logger = logging.getLogger(__name__)

FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
ALPACA_INTRODUCTION = "Below is an instruction that describes a task"
ALPACA_REQUEST = "Write a response that appropriately completes the request."


def parse_recipe(argv: Sequence[str] | None = None) -> Recipe:
    """The recipe of a command line, `--config RECIPE [--key value ...]`, with the keys that training needs.

    Raises:
        ConfigError: see `load_recipe`; or a key that training needs is not set.
    """
    name, overrides = parse_command_line(sys.argv[1:] if argv is None else argv)
    recipe = load_recipe(name, overrides)
    missing = [key for key in ("model_name_or_path", "dataset_name") if not recipe.get(key)]
    if missing:
        raise ConfigError(f"{recipe.path} does not set {' and '.join(missing)}. Set it there or with --{missing[0]}.")
    if not recipe.get("use_peft") and not recipe.get("adapter_name_or_path"):
        raise ConfigError("Nothing would be trained. Set use_peft: true for a new adapter, or adapter_name_or_path.")
    return recipe


def configure_logging() -> None:
    """Our decisions on rank 0, warnings on every rank."""
    from hf_fsdp_qlora.distributed import local_rank

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_fsdp_qlora").setLevel(logging.WARNING if local_rank() else logging.INFO)


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the recipe's chat template.

    TRL would clone a chat template after the model is built and resize its embeddings for the template's tokens. Here
    it is cloned first, and `chat_template_path` is cleared so that the trainer does not do it again.

    Raises:
        ConfigError: the template's tokens do not fit the rows that the checkpoint's embedding has.
    """
    from transformers import AutoConfig, AutoTokenizer

    name, revision = recipe.get("model_name_or_path"), recipe.get("model_revision")
    args = recipe.training_args
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    if args.chat_template_path is None:
        return tokenizer
    template = Path(args.chat_template_path)
    if template.suffix in (".jinja", ".j2"):
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    else:
        added = _clone_chat_template(tokenizer, AutoTokenizer.from_pretrained(args.chat_template_path))
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
        _check_rows(tokenizer, added, config.get_text_config().vocab_size, args.chat_template_path)
        # The trainer writes eos_token into the model's configs, as TRL's cloning would have done.
        args.eos_token = tokenizer.eos_token
    args.chat_template_path = None
    return tokenizer


def load_datasets(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The training data, and the evaluation data if the recipe evaluates.

    `dataset_name` and `eval_dataset_name` are hub names, local jsonl, json, csv or parquet files, or folders of them.
    A file is one split; slices such as `train[:95%]` work.

    Raises:
        ConfigError: no such file or split, or no columns that the trainer knows.
    """
    training = recipe.training_args
    name = recipe.get("dataset_name")
    train = _load_split(recipe, name, recipe.get("dataset_train_split"))
    if training.eval_strategy == "no" and not training.eval_on_start and not training.do_eval:
        evaluation = None
    else:
        evaluation = _load_split(recipe, recipe.get("eval_dataset_name") or name, recipe.get("dataset_test_split"))
    for dataset in (train, evaluation):
        if dataset is not None:
            _check_columns(dataset, training, tokenizer)
    return train, evaluation


def numbers(recipe: Recipe) -> dict[str, Any]:
    """`load_model`'s precision, dtype and adapter_dtype. With a preset, only what the recipe sets beside it, so that
    contradictions are found."""
    import torch

    preset = recipe.qlora_args.precision
    dtypes = {"dtype": model_dtype(recipe), "adapter_dtype": getattr(torch, recipe.get("adapter_dtype"))}
    given = {key: value if preset is None or key in recipe.values else None for key, value in dtypes.items()}
    return {"precision": preset, **given}


def model_dtype(recipe: Recipe) -> torch.dtype:
    """`dtype` as torch names it; "auto" is the dtype in the checkpoint's config. `precision` sets it too."""
    import torch
    from transformers import AutoConfig

    from hf_fsdp_qlora.precision import resolve_precision

    name = recipe.get("dtype")
    preset = recipe.qlora_args.precision
    if preset is not None and "dtype" not in recipe.values:
        return resolve_precision(preset).dtype
    if name not in (None, "auto"):
        return getattr(torch, name)
    config = AutoConfig.from_pretrained(
        recipe.get("model_name_or_path"),
        revision=recipe.get("model_revision"),
        trust_remote_code=recipe.get("trust_remote_code"),
    )
    return config.dtype or torch.float32


def quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """The config for `load_in_4bit` and its companions, as TRL builds it; ours where the block size is not 64."""
    from trl import get_quantization_config

    from hf_fsdp_qlora.quantization import BlockwiseFourBitConfig

    dtype = str(model_dtype(recipe)).removeprefix("torch.")
    config = get_quantization_config(dataclasses.replace(recipe.model_args, dtype=dtype))
    blocksize = recipe.get("bnb_4bit_blocksize")
    if config is not None and config.load_in_4bit and blocksize != 64:
        keys = ("quant_type", "use_double_quant", "compute_dtype", "quant_storage")
        settings = {f"bnb_4bit_{key}": getattr(config, f"bnb_4bit_{key}") for key in keys}
        config = BlockwiseFourBitConfig(bnb_4bit_blocksize=blocksize, **settings)
    if config is not None and recipe.get("train_new_layers"):
        config.llm_int8_skip_modules = _expansion(recipe).new_modules
    return config


def adapter_config(recipe: Recipe) -> PeftConfig | None:
    """What is trained: LoRA as TRL builds it, or the layers that `expand` added; None to continue a saved adapter.

    Raises:
        ConfigError: `train_new_layers` with a model that `expand` has not written.
    """
    from trl import get_peft_config

    from hf_fsdp_qlora.new_layers import new_layers_config

    if recipe.get("adapter_name_or_path"):
        return None
    if recipe.get("train_new_layers"):
        return new_layers_config(_expansion(recipe))
    return get_peft_config(recipe.model_args)


def optimizer_choice(recipe: Recipe) -> tuple[type, dict[str, Any]] | None:
    """`optimizer_cls_and_kwargs` for the trainer: PEFT's LoRA+ groups around the recipe's `optim`, or None.

    Raises:
        ConfigError: the ratio is below 1.
    """
    ratio = recipe.qlora_args.loraplus_lr_ratio
    if ratio is None:
        return None
    if ratio < 1:
        raise ConfigError(
            f"loraplus_lr_ratio={ratio} must be 1 or more (16 is the paper's). Leave it out for plain LoRA."
        )
    from transformers import Trainer

    args = recipe.training_args
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    kwargs |= {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": args.weight_decay}
    return LoraPlusFactory, {"optimizer_cls": optimizer_cls, **kwargs}


class LoraPlusFactory:
    """What the Trainer calls to make an optimizer that needs to see parameter names."""

    def __call__(
        self, model: Any, *, optimizer_cls: type[torch.optim.Optimizer], **kwargs: Any
    ) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        optimizer = create_loraplus_optimizer(model, optimizer_cls, **kwargs)
        # PEFT leaves groups empty, and torch.distributed.checkpoint cannot resume more than one empty group.
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer


def resume_point(args: SFTConfig) -> str | None:
    """The checkpoint `resume_from_checkpoint` means: a folder, "true" (the last one), "auto" (the last, if any).

    The last one is the last whose save was completed.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    value = args.resume_from_checkpoint
    if value is None or value.lower() == "false":
        return None
    if value.lower() not in ("true", "auto"):
        if not Path(value).is_dir():
            raise ConfigError(f"resume_from_checkpoint={value!r} is no folder. Give a checkpoint, true or auto.")
        return value
    assert args.output_dir is not None  # SFTConfig has put a default there
    last = _last_complete_checkpoint(Path(args.output_dir))
    if last is None and value.lower() == "true":
        raise ConfigError(
            f"resume_from_checkpoint=true, but {args.output_dir} has no complete checkpoint. "
            "Use auto to start from the beginning where there is none."
        )
    return last


def save_report(report: Any, args: SFTConfig) -> None:
    """Keep what `load_model` did beside the adapter, as load_report.json (rank 0 only)."""
    from hf_fsdp_qlora.distributed import rank

    assert args.output_dir is not None  # SFTConfig has put a default there
    if rank() == 0:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(report), indent=2, default=str)
        (folder / "load_report.json").write_text(text + "\n", encoding="utf-8")


def _last_complete_checkpoint(output_dir: Path) -> str | None:
    """A run that is killed while it saves leaves a folder without `trainer_state.json`, which is written last."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*")}
    folders = sorted((int(match[1]), path) for path, match in steps.items() if match and path.is_dir())
    skipped: list[str] = []
    while folders and not (folders[-1][1] / "trainer_state.json").is_file():
        skipped.append(folders.pop()[1].name)
    if skipped:
        logger.warning("Not resuming %s in %s: no trainer_state.json, so saving was cut short", ", ".join(skipped),
                       output_dir)  # fmt: skip
    return str(folders[-1][1]) if folders else None


def _expansion(recipe: Recipe) -> Expansion:
    from hf_fsdp_qlora.base_checkpoint import local_folder
    from hf_fsdp_qlora.expand import read_expansion

    return read_expansion(local_folder(recipe.get("model_name_or_path"), recipe.get("model_revision"), None))


def _clone_chat_template(tokenizer: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase) -> list[str]:
    """Copy the template, the end-of-turn token and the tokens that are new; returns the new ones."""
    tokenizer.chat_template = source.get_chat_template()
    known = tokenizer.get_vocab()
    new = [token for token in source.added_tokens_decoder.values() if token.content not in known]
    tokenizer.add_tokens(new)
    tokenizer.eos_token = source.eos_token
    return [token.content for token in new]


def _check_rows(tokenizer: PreTrainedTokenizerBase, added: list[str], num_rows: int, template: str) -> None:
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > num_rows:
        raise ConfigError(
            f"chat_template_path={template!r} adds {len(added)} tokens ({', '.join(added[:3])}, ...), which needs "
            f"{needed} embedding rows; the checkpoint has {num_rows}, and the embeddings of a sharded model cannot be "
            "resized. Use a template (a .jinja file, or another model's) whose tokens this tokenizer has."
        )
    if added:
        logger.warning(
            "The chat template uses %d tokens that the model has never seen: %s. Train their embeddings with "
            "lora_modules_to_save: [embed_tokens, lm_head].",
            len(added),
            ", ".join(added[:5]),
        )


def _load_split(recipe: Recipe, name: str, split: str) -> Dataset | IterableDataset:
    from datasets import load_dataset

    args = recipe.script_args
    path = Path(name).expanduser()
    builder = next((FILE_BUILDERS[suffix] for suffix in path.suffixes if suffix in FILE_BUILDERS), None)
    if builder and not path.is_file():
        raise ConfigError(f"There is no file {name!r}. Correct dataset_name (or eval_dataset_name).")
    source: dict[str, Any] = {"path": str(path) if path.is_dir() else name, "name": args.dataset_config}
    if builder:
        # The file is the split that is asked for, whatever its name.
        source = {"path": builder, "data_files": {re.split(r"\W", split)[0]: str(path)}}
    try:
        dataset = load_dataset(**source, split=split, streaming=args.dataset_streaming)
    except ValueError as error:
        if "split" not in str(error):
            raise
        raise ConfigError(f"{name!r} has no split {split!r}: {error} Set dataset_train_split, dataset_test_split or "
                          "eval_dataset_name.") from error  # fmt: skip
    if recipe.qlora_args.dataset_format == "alpaca":
        columns = dataset.column_names
        if not {"instruction", "output"} <= set(columns or []):
            raise ConfigError(f"dataset_format: alpaca needs the columns instruction and output; got {columns}.")
        return dataset.map(_alpaca, remove_columns=columns)
    return dataset


def _alpaca(row: dict[str, str]) -> dict[str, str]:
    """The prompt of Stanford Alpaca's data release, with and without an input."""
    if row.get("input"):
        head = f"{ALPACA_INTRODUCTION}, paired with an input that provides further context. {ALPACA_REQUEST}"
        body = f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}"
    else:
        head = f"{ALPACA_INTRODUCTION}. {ALPACA_REQUEST}"
        body = f"### Instruction:\n{row['instruction']}"
    return {"prompt": f"{head}\n\n{body}\n\n### Response:\n", "completion": row["output"]}


def _check_columns(dataset: Any, args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    columns = set(dataset.column_names or [])
    if not columns:
        return
    if not (columns & {args.dataset_text_field, "messages", "input_ids"} or {"prompt", "completion"} <= columns):
        raise ConfigError(
            f"The data has the columns {sorted(columns)}; needed are {args.dataset_text_field!r}, or prompt and "
            "completion, or messages. Rename them, or set dataset_text_field or dataset_format."
        )
    if "messages" in columns and not tokenizer.chat_template:
        raise ConfigError("The data is messages, but the tokenizer has no chat template. Set chat_template_path.")
