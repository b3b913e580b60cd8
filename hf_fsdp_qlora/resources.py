"""Find the accelerate configs and recipes that come with the package, by name.

They are top-level folders of a checkout and sub-folders of the installed package (setup.py says how), so both places
are looked at; an editable install is a checkout. A path always wins over a name, so that a user's own file can be
called like one of ours.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from hf_fsdp_qlora.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent


def find_recipe(path_or_name: str | Path) -> Path:
    """The YAML file of a recipe.

    Args:
        path_or_name: a path, or a name such as "llama/8b_nf4_fsdp2", with or without ".yaml"; the family may be left
            out where the name is unique.

    Raises:
        ConfigError: there is no such file or recipe; the message has the nearest name.
    """
    return _find(path_or_name, "recipes", "recipe")


def find_accelerate_config(path_or_name: str | Path) -> Path:
    """The YAML file of an accelerate config.

    Args:
        path_or_name: a path, or a name such as "fsdp2", with or without ".yaml".

    Raises:
        ConfigError: there is no such file or config; the message has the nearest name.
    """
    return _find(path_or_name, "accelerate_configs", "accelerate config")


def recipe_names() -> list[str]:
    """Names of the shipped recipes ("family/recipe"), sorted."""
    return sorted(_shipped("recipes"))


def accelerate_config_names() -> list[str]:
    """Names of the shipped accelerate configs, sorted."""
    return sorted(_shipped("accelerate_configs"))


def sft_script() -> Path:
    """The training script that every launch command names."""
    return _folder("recipes") / "sft.py"


def _find(path_or_name: str | Path, folder: str, what: str) -> Path:
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    shipped = _shipped(folder)
    name = path.as_posix().removeprefix(f"{folder}/").removesuffix(".yaml")
    found = [key for key in shipped if key == name] or [key for key in shipped if key.rpartition("/")[2] == name]
    if len(found) == 1:
        return shipped[found[0]]
    if found:
        raise ConfigError(f"{what} {str(path_or_name)!r} can mean {' or '.join(sorted(found))}. Give the full name.")
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{what} {str(path_or_name)!r} is neither a file nor a shipped name.{hint} "
        f"Shipped: {', '.join(sorted(shipped))}."
    )


def _shipped(folder: str) -> dict[str, Path]:
    root = _folder(folder)
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.yaml")}


def _folder(name: str) -> Path:
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name
