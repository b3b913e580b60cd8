"""Which engine the launcher asked for, and how it wants the quantised bytes stored.

`accelerate launch` tells a script what to do through environment variables; `load_model` runs before any Trainer or
Accelerator exists, so it reads the same ones.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig, PartialState
from transformers.utils import strtobool

from hf_fsdp_qlora.distributed import settle_at_exit, world_size
from hf_fsdp_qlora.errors import ConfigError

Engine = Literal["none", "ddp", "fsdp1", "fsdp2"]
Offload = Literal["none", "base", "all"]
"""What lives in pinned host memory: nothing, the quantised rows, or every parameter."""


def resolve_engine(fsdp: str) -> Engine:
    """The engine to load for. Opens the process group if a launcher started several processes.

    Args:
        fsdp: "auto" for what accelerate's environment says; "fsdp2", "fsdp1" or "none" to overrule it.

    Raises:
        ConfigError: the engine is unknown or not supported.
    """
    if fsdp == "auto":
        fsdp = f"fsdp{os.environ.get('FSDP_VERSION', '1')}" if _flag("ACCELERATE_USE_FSDP") else "none"
    if fsdp not in ("fsdp2", "fsdp1", "none"):
        raise ConfigError(f"fsdp={fsdp!r} is unknown; use 'auto', 'fsdp2', 'fsdp1' or 'none'.")
    state = PartialState()
    settle_at_exit()
    if fsdp != "none":
        if not dist.is_initialized():
            raise ConfigError(
                f"{fsdp.upper()} needs a process group, also for one process: start the script with `accelerate "
                "launch --config_file ...` or torchrun, or pass fsdp='none'."
            )
        return fsdp  # type: ignore[return-value]
    return "ddp" if state.num_processes > 1 else "none"


def resolve_device() -> torch.device:
    """The device this process computes on, with its index."""
    device = PartialState().device
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_offload(offload: Offload, engine: Engine, device: torch.device, *, pin_memory: bool = True) -> None:
    """Refuse to offload where it cannot work.

    Raises:
        ConfigError: the engine has no offload, or it pins memory whether asked to or not.
    """
    if offload != "none" and engine == "fsdp1" and not pin_memory:
        raise ConfigError(
            "offload_pin_memory=False with FSDP1 cannot be honoured: torch pins what FSDP1 offloads. Leave it out, or "
            "use FSDP2 (fsdp_version: 2, accelerate_configs/fsdp2_offload.yaml)."
        )
    if offload != "none" and engine not in ("fsdp1", "fsdp2"):
        raise ConfigError(
            f"offload={offload!r} needs FSDP2 or FSDP1, also on one GPU. Launch with "
            "accelerate_configs/fsdp2_offload.yaml or fsdp1_offload.yaml."
        )
    if offload != "none" and engine == "fsdp1" and device.type == "cpu":
        raise ConfigError(
            f"offload={offload!r} with FSDP1 needs an accelerator: torch pins the shards' memory. On the CPU "
            "everything is in host memory already; leave it out."
        )


def check_offload_backend(offload: Offload, engine: Engine, device: torch.device) -> None:
    """Refuse to offload everything where the process group cannot reduce gradients on the host.

    Raises:
        ConfigError: there is no backend for tensors on the CPU.
    """
    if engine == "fsdp2" and offload == "all" and device.type == "cuda" and "cpu:" not in dist.get_backend_config():
        raise ConfigError(
            "offload='all' puts gradients on the host, and the process group cannot reduce them there. Set "
            "fsdp_offload_params: true in the accelerate config, so that accelerate opens a gloo backend too."
        )


def resolve_offload(offload: str | None) -> Offload:
    """What lives in host memory; None means what accelerate's environment says (`fsdp_offload_params`).

    Raises:
        ConfigError: the value is unknown.
    """
    if offload is None:
        return "all" if _flag("FSDP_OFFLOAD_PARAMS") else "none"
    if offload not in ("none", "base", "all"):
        raise ConfigError(f"offload={offload!r} is unknown; use 'none', 'base' (quantised rows only) or 'all'.")
    return offload  # type: ignore[return-value]


def resolve_replicas() -> int:
    """Copies of the model that the ranks hold together under FSDP2: accelerate's `dp_replicate_size`, 1 by default.

    That the sizes fit the number of ranks is a rule of validation_launch_rules.py (`replicas_fit_the_processes`).
    """
    return ParallelismConfig().dp_replicate_size if _flag("ACCELERATE_USE_PARALLELISM_CONFIG") else 1


def launched_config(engine: Engine, device: torch.device) -> dict[str, Any]:
    """The accelerate config that the launcher's environment stands for, in the keys of a config file.

    Args:
        engine: of `resolve_engine`; without one of accelerate's own, `load_model`'s argument may have said FSDP.
        device: of `resolve_device`.
    """
    others = {"ACCELERATE_USE_DEEPSPEED": "DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM"}
    types = {"none": "NO", "ddp": "MULTI_GPU", "fsdp1": "FSDP", "fsdp2": "FSDP"}
    launched = next((name for variable, name in others.items() if _flag(variable)), types[engine])
    sections = {name: {key.lower(): value for key, value in os.environ.items() if key.startswith(f"{name.upper()}_")}
                for name in ("fsdp", "parallelism_config")}  # fmt: skip
    if engine in ("fsdp1", "fsdp2"):
        sections["fsdp"]["fsdp_version"] = engine[-1]
    # The one variable that accelerate names otherwise than the key it comes from (utils/launch.py).
    if "fsdp_transformer_cls_to_wrap" in sections["fsdp"]:
        sections["fsdp"]["fsdp_transformer_layer_cls_to_wrap"] = sections["fsdp"].pop("fsdp_transformer_cls_to_wrap")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return {
        "distributed_type": launched, "mixed_precision": mixed_precision(), "use_cpu": device.type == "cpu",
        "num_processes": world_size(), "num_machines": max(1, world_size() // local_ranks),
        "fsdp_config": sections["fsdp"],
        "parallelism_config": sections["parallelism_config"] if _flag("ACCELERATE_USE_PARALLELISM_CONFIG") else {},
    }  # fmt: skip


def reshard_after_forward() -> bool:
    """accelerate's `fsdp_reshard_after_forward`, true by default."""
    return _flag("FSDP_RESHARD_AFTER_FORWARD", default=True)


def resolve_storage_dtype(quantization_config: Any, engine: Engine, dtype: torch.dtype) -> torch.dtype:
    """The dtype under which rows are stored.

    uint8; float32 views where FSDP2 shards them; under FSDP1 the model's dtype, because a flat parameter has one dtype
    for everything in it, and because a mixed-precision policy leaves parameters alone that are in its dtype already.

    Args:
        quantization_config: `bnb_4bit_quant_storage` is read if there is one; uint8, its default, means "choose".
        dtype: of everything that is not quantised, FSDP1's mixed-precision `param_dtype`.

    Raises:
        ConfigError: the engine would damage bytes that are stored this way.
    """
    wanted = getattr(quantization_config, "bnb_4bit_quant_storage", torch.uint8)
    if engine == "fsdp1":
        if wanted not in (torch.uint8, dtype):
            raise ConfigError(
                f"bnb_4bit_quant_storage={wanted} with FSDP1 and dtype={dtype} would be cast as if the bytes were "
                "numbers: flat parameters have one dtype, the mixed-precision one. Leave bnb_4bit_quant_storage at "
                f"its default, or set it to {dtype}."
            )
        return dtype
    if engine != "fsdp2":
        return wanted
    if wanted not in (torch.uint8, torch.float32):
        raise ConfigError(
            f"bnb_4bit_quant_storage={wanted} would be corrupted by FSDP2 on CUDA (NaN bit patterns are rewritten "
            "when shards are copied). Leave bnb_4bit_quant_storage at its default."
        )
    return torch.float32


def mixed_precision() -> str:
    """accelerate's `mixed_precision`: "no", "bf16", "fp16", ... The training arguments set the variable too."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def _flag(name: str, default: bool = False) -> bool:
    return bool(strtobool(os.environ.get(name, str(default))))
