"""The tokenizer and the data sets of a recipe, ready before the model is loaded.

The tokenizer comes before the model, because a chat template can add tokens and the embeddings of a sharded model
cannot be resized; the data comes before the model too, so that a wrong column costs seconds and not the load of a
large checkpoint.

Heavy imports are inside the functions, as in train.py.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fsdp_qlora.config import Recipe
from hf_fsdp_qlora.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

logger = logging.getLogger(__name__)

FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
ALPACA_INTRODUCTION = "Below is an instruction that describes a task"
ALPACA_REQUEST = "Write a response that appropriately completes the request."


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the recipe's chat template.

    TRL would clone a chat template after the model is built and resize its embeddings for the template's tokens. Here
    it is cloned first, and `chat_template_path` is cleared so that the trainer does not do it again.

    Raises:
        ConfigError: the tokenizer cannot be read, or the template's tokens do not fit the rows that the checkpoint's
            embedding has.
    """
    from transformers import AutoConfig

    name, revision = recipe.get("model_name_or_path"), recipe.get("model_revision")
    args = recipe.training_args
    tokenizer = _read_tokenizer(name, revision=revision, trust_remote_code=args.trust_remote_code)
    if args.chat_template_path is None:
        return tokenizer
    template = Path(args.chat_template_path)
    if template.suffix in (".jinja", ".j2"):
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    else:
        added = _clone_chat_template(tokenizer, _read_tokenizer(args.chat_template_path))
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


def _read_tokenizer(name: str, **options: Any) -> Any:
    """transformers' AutoTokenizer, whose errors are the user's: a wrong name, no network, files that are missing."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The tokenizer of {name!r} cannot be read. Give a folder with config.json and tokenizer.json, or a hub "
            f"id that this machine can reach. transformers says: {error}"
        ) from error


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
