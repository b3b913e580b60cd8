"""A checkpoint whose saving was cut short is not resumed: `resume_from_checkpoint=True` takes the one before it.

The Trainer writes into the final folder, and `get_last_checkpoint` takes the highest number, whole or not. So while a
checkpoint of our models is being written there is a mark in its folder, and no `trainer_state.json`, which the Trainer
writes after everything else. A folder with the mark and no readable `trainer_state.json` is passed over, and so is one
without the file, which the Trainer cannot resume; other folders are judged as upstream does. `save_total_limit`
deletes older checkpoints after that file was written.

https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/trainer.py (_save_checkpoint)
Can go when the Trainer writes checkpoints beside their place and renames them.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_fsdp_qlora.distributed import same_outcome
from hf_fsdp_qlora.trainer_compat.model import attachment

logger = logging.getLogger(__name__)

MARK = ".saving"
TRAINER_STATE_NAME = "trainer_state.json"


def patched_save_checkpoint(stock: Any) -> Any:
    """Mark the folder until the checkpoint is complete."""

    @functools.wraps(stock)
    def _save_checkpoint(trainer: Trainer, model: Any, trial: Any) -> None:
        if attachment(trainer.model) is None:
            stock(trainer, model, trial)
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        folder = Path(trainer._get_output_dir(trial=trial)) / name
        with same_outcome(f"saving to {folder}"):
            if trainer.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / MARK).touch()
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        stock(trainer, model, trial)
        with same_outcome(f"saving to {folder}"):  # waits for what other ranks write
            pass
        if trainer.args.should_save:
            # Rotation goes by numbers where times of change cannot be trusted, and may have taken this very folder.
            (folder / MARK).unlink(missing_ok=True)

    return _save_checkpoint


def patched_get_last_checkpoint(stock: Any) -> Any:
    """The last checkpoint that is complete."""

    @functools.wraps(stock)
    def get_last_checkpoint(folder: str) -> str | None:
        last = last_complete_checkpoint(Path(folder))
        return None if last is None else str(last)

    return get_last_checkpoint


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of the highest step whose saving ended; None if there is none, or no such folder."""
    steps = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in output_dir.glob("*")}
    folders = sorted((int(match[1]), path) for path, match in steps.items() if match and path.is_dir())
    passed_over: list[str] = []
    while folders and is_unfinished(folders[-1][1]):
        passed_over.append(folders.pop()[1].name)
    last = folders[-1][1] if folders else None
    if passed_over:
        logger.warning("Saving %s in %s was cut short; going on from %s", ", ".join(passed_over), output_dir,
                       "the beginning" if last is None else last.name)  # fmt: skip
    return last


def is_unfinished(checkpoint: Path) -> bool:
    """Whether saving this checkpoint began and did not end."""
    state = checkpoint / TRAINER_STATE_NAME
    if not (checkpoint / MARK).exists():
        return not state.is_file()
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return True
    return False
