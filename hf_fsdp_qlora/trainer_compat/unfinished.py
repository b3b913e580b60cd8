"""A checkpoint whose saving was cut short is not resumed: `resume_from_checkpoint=True` takes the one before it.

The Trainer writes into the final folder, and `get_last_checkpoint` takes the highest number, whole or not. So while a
checkpoint of our models is being written there is a mark in its folder, and no `trainer_state.json`, which the Trainer
writes after everything else. A folder with the mark and no readable `trainer_state.json` is passed over; other folders
are judged as upstream does. `save_total_limit` deletes older checkpoints after that file was written.

https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/trainer.py (_save_checkpoint)
Can go when the Trainer writes checkpoints beside their place and renames them.
"""

from __future__ import annotations

import functools
import json
import logging
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
        last = stock(folder)
        if last is None or not is_unfinished(Path(last)):
            return last
        numbered = {
            int(number): path
            for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
            if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal() and path.is_dir()
        }
        whole = [number for number, path in numbered.items() if not is_unfinished(path)]
        chosen = str(numbered[max(whole)]) if whole else None
        logger.warning("Saving %s was cut short; going on from %s", last, chosen)
        return chosen

    return get_last_checkpoint


def is_unfinished(checkpoint: Path) -> bool:
    """Whether saving this checkpoint began and did not end."""
    if not (checkpoint / MARK).exists():
        return False
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return True
    return False
