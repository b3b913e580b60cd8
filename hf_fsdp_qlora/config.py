"""Recipes: flat YAML whose keys are the fields of upstream's dataclasses and of one of ours.

A recipe is read in three steps: the file, then the command line over it, then every value through the parser that
upstream builds from the dataclass field, so that types and choices are upstream's and a value means the same in the
file and on the command line. All problems are reported together.

The dataclasses themselves are built when they are asked for: `SFTConfig` opens the process group and refuses bf16 on a
machine without a GPU, and reading or validating a recipe must do neither.

Left out: TRL's `DatasetMixtureConfig` (its keys are nested) and TRL's `env` key (a recipe does not change the
environment).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.qlora_arguments import QLoraArguments
from hf_fsdp_qlora.resources import find_recipe
from hf_fsdp_qlora.rotary_arguments import RotaryArguments

if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser


@dataclass(frozen=True)
class Recipe:
    """A recipe's values, checked, and the dataclasses that are made from them.

    Attributes:
        values: only the keys that the file or the command line set, each in its field's type.
        path: the file, None for a recipe from values alone.
    """

    values: Mapping[str, Any]
    path: Path | None = None

    def get(self, key: str) -> Any:
        """The value of a key, or the default of its field. KeyError for a key that no dataclass has."""
        if key in self.values:
            return self.values[key]
        field_ = recipe_fields()[key]
        if field_.default_factory is not dataclasses.MISSING:
            return field_.default_factory()
        return field_.default

    @cached_property
    def script_args(self) -> ScriptArguments:
        """TRL's ScriptArguments: the data set."""
        return self._build(_dataclasses()[0])

    @cached_property
    def training_args(self) -> SFTConfig:
        """TRL's SFTConfig: the training. Building it opens the process group under a launcher.

        `use_cpu` is set where there is no accelerator: accelerate does not pass its own `use_cpu` on to several
        processes, and without it each of them would train alone (accelerate 1.15, `prepare_multi_gpu_env`).
        """
        import torch

        from hf_fsdp_qlora.precision import recipe_values

        preset = {} if self.get("precision") is None else {"bf16": recipe_values(self.get("precision"))["bf16"]}
        return self._build(_dataclasses()[1], use_cpu=not torch.accelerator.is_available(), **preset)

    @cached_property
    def model_args(self) -> ModelConfig:
        """TRL's ModelConfig: the model, the quantisation and LoRA."""
        return self._build(_dataclasses()[2])

    @cached_property
    def qlora_args(self) -> QLoraArguments:
        """What TRL has no field for."""
        return self._build(QLoraArguments)

    @cached_property
    def rotary_args(self) -> RotaryArguments:
        """Rotary training, where `rotary_active` is set."""
        return self._build(RotaryArguments)

    def _build(self, class_: Any, **defaults: Any) -> Any:
        names = {field_.name for field_ in dataclasses.fields(class_) if field_.init}
        return class_(**{**defaults, **{key: value for key, value in self.values.items() if key in names}})


def load_recipe(path_or_name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and put overrides over it. Precedence: field defaults < file < overrides.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe.
        overrides: values by key, as Python values or as the strings of a command line.

    Raises:
        ConfigError: no such recipe, no flat mapping, or any unknown key or wrong value; all of them in one message.
    """
    path = find_recipe(path_or_name)
    problems: list[str] = []
    values = _check(_read(path), str(path), problems)
    values |= _check(overrides or {}, "overrides", problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return Recipe(values, path)


def parse_command_line(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Split `--config RECIPE [--key value ...]` into the recipe and the overrides `load_recipe` takes.

    `--key=value`, `--key a b` for lists, a bare `--flag` for true and `--no_flag` for false are understood, with "-"
    or "_" in names.

    Raises:
        ConfigError: there is no --config, or a word stands where a --key is needed.
    """
    overrides: dict[str, Any] = {}
    key: str | None = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            overrides[key] = [value] if equals else []
        elif key is None:
            raise ConfigError(f"{word!r} does not follow a --key. Usage: --config RECIPE [--key value ...]")
        else:
            overrides[key].append(word)
    config = overrides.pop("config", [])
    if len(config) != 1:
        raise ConfigError("No recipe. Usage: --config RECIPE [--key value ...], RECIPE a YAML file or a shipped name.")
    return config[0], overrides


def recipe_fields() -> dict[str, dataclasses.Field]:
    """Every key a recipe can have, with the dataclass field it sets."""
    return {field_.name: field_ for class_ in _dataclasses() for field_ in dataclasses.fields(class_) if field_.init}


def _dataclasses() -> tuple[Any, ...]:
    from trl import ModelConfig, ScriptArguments, SFTConfig

    return ScriptArguments, SFTConfig, ModelConfig, QLoraArguments, RotaryArguments


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys silently; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"{self.name} sets {', '.join(twice)} more than once. Keep one.")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        try:
            content = yaml.load(file, _UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a flat mapping of keys to values, got {type(content).__name__}.")
    return content


def _check(values: Mapping[str, Any], source: str, problems: list[str]) -> dict[str, Any]:
    """Values in their fields' types; what is wrong with the others goes to `problems`."""
    from trl import TrlParser

    fields = recipe_fields()
    parser = TrlParser(_dataclasses(), exit_on_error=False, allow_abbrev=False, add_help=False)
    hints = {name: hint for class_ in _dataclasses() for name, hint in typing.get_type_hints(class_).items()}
    checked = {}
    for key, value in values.items():
        if value == [] and str(key).startswith("no_") and key not in fields:
            key, value = key.removeprefix("no_"), False
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            problems.append(f"{source}: unknown key {str(key)!r}.{hint}")
            continue
        try:
            checked[key] = _convert(parser, key, value, hints[key])
        except (argparse.ArgumentError, ValueError) as error:
            text = error.message if isinstance(error, argparse.ArgumentError) else str(error)
            problems.append(f"{source}: {key}={_shown(value)}: {text}")
    return checked


def _convert(parser: TrlParser, key: str, value: Any, hint: Any) -> Any:
    """One value through upstream's parser for its field. ValueError or ArgumentError says what is wrong."""
    allowed = _members(hint)
    if value is None or (isinstance(value, str) and value in ("none", "null") and str not in allowed):
        if type(None) not in allowed:
            raise ValueError(f"a value is needed ({_readable(allowed)}).")
        return None
    if isinstance(value, bool) and bool not in allowed:
        raise ValueError(f"{_readable(allowed)} is needed. Quote the word: YAML reads yes, no, on, off as booleans.")
    if isinstance(value, dict):
        if dict not in allowed:
            raise ValueError(f"a mapping was got, {_readable(allowed)} is needed. Recipes are flat.")
        return value
    words = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(words) == 1 and list not in allowed:
        # Joined by "=" so that a value may begin with a dash.
        arguments = [f"--{key}={_word(words[0])}"]
    elif isinstance(value, (list, tuple)) and words and list not in allowed:
        raise ValueError(f"{len(words)} values were got, one is needed ({_readable(allowed)}).")
    else:
        arguments = [f"--{key}", *map(_word, words)]
    namespace, rest = parser.parse_known_args(arguments)
    if rest:
        # Upstream's command line takes one value for `str | list[str]`; its dataclass takes the list.
        return words
    parsed = getattr(namespace, key)
    if dict in allowed and isinstance(parsed, str) and parsed.startswith("{"):
        return json.loads(parsed)
    return parsed


def _word(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise ValueError("a nested value was got. Recipes are flat.")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else repr(value)


def _members(hint: Any) -> set[Any]:
    """The plain types a field takes: `list[str] | str | None` gives {list, str, NoneType}."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return {typing.get_origin(member) or member for member in (typing.get_args(hint) if union else (hint,))}


def _readable(allowed: set[Any]) -> str:
    return " or ".join(sorted(member.__name__ for member in allowed if member is not type(None)))
