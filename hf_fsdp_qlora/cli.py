"""`hf-fsdp-qlora`: one sub-command per file of `hf_fsdp_qlora/commands`.

A command is a module there, named like it, with `register(subparsers)`, which adds its parser, and
`run(args) -> int | None`, which does the work and imports what is heavy: `--help` answers without importing torch. A
new file is a new command; there is no list to keep.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import pkgutil
import sys
from collections.abc import Sequence

from hf_fsdp_qlora import commands
from hf_fsdp_qlora.errors import ConfigError

# Commands that pass `--key value` on to the recipe; they find these words in `args.rest`.
WITH_RECIPE_KEYS = frozenset({"train"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; sys.argv's by default.

    Returns:
        The exit status: 0; 2 after a ConfigError or a file that cannot be read or written, whose text goes to stderr
        without a traceback; 130 after Ctrl-C.
    """
    # On import it tells CPU users of an optional kernel package, in front of every answer.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(
        prog="hf-fsdp-qlora", description="Fine-tune quantised models that do not fit one GPU.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {
        module.name: importlib.import_module(f"{commands.__name__}.{module.name}")
        for module in pkgutil.iter_modules(commands.__path__)
    }
    for module in modules.values():
        module.register(subparsers)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in WITH_RECIPE_KEYS:
        command: argparse.ArgumentParser = subparsers.choices[args.command]
        command.error(f"unknown arguments: {' '.join(rest)}.{_nearest(command, rest)}")
    args.rest = rest
    try:
        return modules[args.command].run(args) or 0
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _nearest(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """The option that was probably meant, as a sentence."""
    options = [option for action in parser._actions for option in action.option_strings]
    near = [match for word in unknown for match in difflib.get_close_matches(word.partition("=")[0], options, n=1)]
    return f" Did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
