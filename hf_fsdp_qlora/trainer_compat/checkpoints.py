"""Checkpoints of our models: a standard PEFT directory plus the optimizer, the same for every engine.

Stock code writes the adapter up to twice (`adapter_model.safetensors`, `pytorch_model_fsdp*`), or under
SHARDED_STATE_DICT only in a form that PEFT cannot read, and an engine cannot resume what another one saved. Here the
PEFT directory is what weights are loaded from, and the optimizer is read by the file that is there:

| saved by | file | keyed by |
| --- | --- | --- |
| FSDP, FULL_STATE_DICT | `optimizer.bin` | parameter name |
| FSDP, SHARDED_STATE_DICT | `optimizer_0/` (torch.distributed.checkpoint) | parameter name |
| one process, DDP | `optimizer.pt` | position |

Source: https://github.com/huggingface/transformers/issues/30491 (SHARDED_STATE_DICT saves no model).
Left out: rotary training without an adapter, which has its own files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_fsdp_qlora.distributed import rank, same_outcome
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.fsdp1 import is_wrapped
from hf_fsdp_qlora.fsdp1_state import load_optimizer_state, optimizer_names, optimizer_state

_BY_NAME, _SHARDED, _BY_POSITION = "optimizer.bin", "optimizer_0", "optimizer.pt"


def has_optimizer(checkpoint: Path) -> bool:
    """Whether the checkpoint has an optimizer state (it has none after `save_only_model`)."""
    return any((checkpoint / name).exists() for name in (_BY_NAME, _SHARDED, _BY_POSITION))


def restore_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Load the optimizer state that any engine saved, into the optimizer of this one.

    Every rank reads the files and takes its part; a file is mapped into memory, so ranks of a node share it.

    Raises:
        ValueError: the checkpoint's optimizer has other parameters than this one.
    """
    if is_wrapped(model):
        _restore_under_fsdp1(model, optimizer, checkpoint)
        return
    template = get_optimizer_state_dict(model, optimizer)
    if (checkpoint / _SHARDED).is_dir():
        state = {"optimizer": template}
        dcp.load(state, checkpoint_id=str(checkpoint / _SHARDED))
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return
    with same_outcome(f"reading the optimizer state from {checkpoint}"):
        by_name = (checkpoint / _BY_NAME).is_file()
        file = checkpoint / (_BY_NAME if by_name else _BY_POSITION)
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        groups: Any = template["param_groups"]
        names = [group["params"] for group in groups]
        saved = _in_groups(saved, names) if by_name else _keyed_by_name(saved, names)
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))


def save_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Write the whole optimizer state of a sharded model, keyed by parameter name. Collective; rank 0 writes.

    Raises:
        RuntimeError: writing failed on rank 0; raised on the other ranks, which did not write.
    """
    if is_wrapped(model):
        state: Any = optimizer_state(model, optimizer)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(model, optimizer, options=options)
    with same_outcome(f"saving the optimizer state to {checkpoint}"):
        if rank() == 0:
            checkpoint.mkdir(parents=True, exist_ok=True)
            torch.save(state, checkpoint / _BY_NAME)


def _restore_under_fsdp1(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    with same_outcome(f"reading the optimizer state from {checkpoint}"):
        if (checkpoint / _SHARDED).is_dir():
            raise ConfigError(
                f"{checkpoint} has a sharded optimizer state (SHARDED_STATE_DICT), which FSDP1 cannot resume. Resume "
                "it with FSDP2 or on one process, or begin from its adapter (adapter_name_or_path)."
            )
        by_name = (checkpoint / _BY_NAME).is_file()
        file = checkpoint / (_BY_NAME if by_name else _BY_POSITION)
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    names = optimizer_names(model, optimizer)
    with same_outcome(f"reading the optimizer state from {checkpoint}"):
        saved = _in_groups(saved, names) if by_name else _keyed_by_name(saved, names)
    load_optimizer_state(model, optimizer, saved)


def _in_groups(saved: dict[str, Any], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Give the saved settings, group by group, to this run's groups.

    FSDP1's flat parameters hide the names by which the Trainer finds those without weight decay, so that a parameter
    can be in another group there.
    """
    if len(groups) != len(saved["param_groups"]):
        raise ConfigError(
            f"The checkpoint's optimizer has {len(saved['param_groups'])} parameter groups, this run's has "
            f"{len(groups)}. Resume with the optimizer that the checkpoint was trained with."
        )
    pairs = zip(saved["param_groups"], groups, strict=True)
    return {**saved, "param_groups": [{**settings, "params": list(names)} for settings, names in pairs]}


def _keyed_by_name(saved: dict[str, Any], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Replace positions by names: parameters come in the order of the groups, which no engine changes."""
    names = [name for group in groups for name in group]
    positions = [position for group in saved["param_groups"] for position in group["params"]]
    if len(names) != len(positions):
        raise ValueError(
            f"The checkpoint's optimizer has {len(positions)} parameters, this run's has {len(names)}. Resume with "
            "the peft_config and optimizer that the checkpoint was trained with."
        )
    name_of = dict(zip(positions, names, strict=True))
    return {
        "state": {name_of[position]: values for position, values in saved["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[position] for position in group["params"]]} for group in saved["param_groups"]
        ],
    }
