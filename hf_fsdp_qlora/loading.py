"""`load_model`: a model that is quantised and sharded while it is read, so that no rank ever holds more than its part.

The order, and why:

1. Config, model on meta, linear layers replaced, adapters injected: everything has its shape and costs nothing.
2. Checkpoint tensors are matched to parameters from the files' headers. Whatever is wrong is known by now.
3. FSDP2 shards the meta parameters. Storage is allocated only afterwards, for the local shards alone.
4. Weights stream in: own bytes, cast, quantised, written into the shard.
5. Adapters are initialised from the seed, equally for every world size, or read from a saved adapter.
6. Checks: nothing on meta, a sample of rows byte-equal after an all-gather as training does it, replicas equal.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_fsdp_qlora.adapter_source import AdapterSource
from hf_fsdp_qlora.allocation import materialize
from hf_fsdp_qlora.base_record import remember_base
from hf_fsdp_qlora.checkpoint import find_checkpoint, index_checkpoint
from hf_fsdp_qlora.distributed import on_any_rank, patient_ranks, rank, same_outcome
from hf_fsdp_qlora.engine import (
    Engine,
    Offload,
    reshard_after_forward,
    resolve_device,
    resolve_engine,
    resolve_offload,
    resolve_replicas,
    resolve_storage_dtype,
)
from hf_fsdp_qlora.fsdp1 import check_fsdp1, share_rows
from hf_fsdp_qlora.integrity import check_integrity, check_replicas
from hf_fsdp_qlora.layer_options import set_layer_options
from hf_fsdp_qlora.load_checks import check_settings, check_wrapped_classes
from hf_fsdp_qlora.lora import ADAPTER_NAME
from hf_fsdp_qlora.matching import match_checkpoint
from hf_fsdp_qlora.outside import WholeParameters, keep_whole
from hf_fsdp_qlora.precision import Precision, resolve_precision
from hf_fsdp_qlora.prequantized import pack_checkpoint, replace_packed_linears, runtime_config, take_stored_config
from hf_fsdp_qlora.quantization import backend_for_config, skip_modules
from hf_fsdp_qlora.report import make_report
from hf_fsdp_qlora.rotary.config import RotaryConfig, check_load
from hf_fsdp_qlora.sharding import apply_fsdp2, apply_fsdp2_to_rows, make_mesh
from hf_fsdp_qlora.siblings import join_siblings
from hf_fsdp_qlora.skeleton import build_skeleton, decoder_layers, replace_linears
from hf_fsdp_qlora.trainer_compat import attach
from hf_fsdp_qlora.weights import PlannedWeight, fill

logger = logging.getLogger(__name__)

CHECKED_GROUPS = 2
"""Layers whose rows are compared after an all-gather before `load_model` returns."""
SLOWEST_DOWNLOAD_BYTES_PER_S = 5e6
MIN_DOWNLOAD_TIMEOUT_S = 1800
"""How long ranks wait for a download: 140 GB, a 70B model, may take 7.8 hours, where the process group's own time-out
would end the run after 10 minutes."""


def load_model(
    model_name_or_path: str | os.PathLike[str],
    *,
    quantization_config: Any = None,
    peft_config: PeftConfig | None = None,
    rotary: RotaryConfig | None = None,
    dtype: torch.dtype | str | None = None,
    precision: str | None = None,
    fsdp: str = "auto",
    offload: str | None = None,
    offload_pin_memory: bool = True,
    replicate_head: bool = False,
    embedding_on_host: bool = False,
    adapter_name_or_path: str | None = None,
    is_trainable: bool = True,
    adapter_dtype: torch.dtype | str | None = None,
    compile_layers: bool = False,
    checkpoint_layers: int | None = None,
    activation_budget: float | None = None,
    seed: int = 42,
    revision: str = "main",
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    trust_remote_code: bool = False,
    **model_kwargs: Any,
) -> PeftModel | PreTrainedModel:
    """Load a causal language model from safetensors, quantising and sharding it on the way.

    Collective when several ranks were launched: call it on all of them with the same arguments.

    Args:
        model_name_or_path: hub id or local folder.
        quantization_config: transformers' `BitsAndBytesConfig(load_in_4bit=True, ...)` or one of this package's
            configs; None loads the checkpoint as it is: unquantised, or if it was saved by stock transformers in
            bitsandbytes 4 bits, with exactly those bytes. `llm_int8_skip_modules` is honoured;
            `bnb_4bit_compute_dtype` at its default (float32) means `dtype`, `bnb_4bit_quant_storage` at its default
            (uint8) means "choose".
        peft_config: PEFT's `LoraConfig`; None adds no adapter.
        rotary: load for `prepare_rotary`: quantised in the config's `frozen_format`, and all else on every rank.
        dtype: what weights are cast to before they are quantised, what they dequantise to, and the compute dtype
            under FSDP. A torch dtype or its name; bfloat16 unless `precision` says otherwise.
        precision: a preset (precision.py) that sets this and every other dtype together; None goes by the dtypes.
        fsdp: "auto" reads the environment that `accelerate launch` sets; "fsdp2", "fsdp1" and "none" overrule it.
        offload: "none"; "base" keeps quantised rows in pinned host memory; "all" keeps every parameter there. None
            reads accelerate's `fsdp_offload_params`. FSDP only.
        offload_pin_memory: False offloads to ordinary memory: no limit on locked pages, slower copies. FSDP2 only.
        replicate_head: keep the frozen head and final norm whole on every rank: less at the peak of a step where the
            vocabulary is large and the ranks are few. Not under FSDP1; without FSDP they are whole anyway.
        embedding_on_host: keep the frozen input embedding whole in host memory, and look ids up there. FSDP2 only.
        adapter_name_or_path: a saved adapter to continue from, or to evaluate. On another base than its own record
            (base_record.py) tells of, there is a warning.
        is_trainable: False freezes the adapter of `adapter_name_or_path`.
        adapter_dtype: of adapters and other trained parameters; float32 masters unless `precision` says otherwise.
        compile_layers: compile each decoder layer; the first steps take longer, later ones less. Not under FSDP.
            Changes settings of torch._dynamo for the process: see `compile_layers` and `join_siblings`.
        checkpoint_layers: where gradient checkpointing is on, recompute the first so many decoder layers only; the
            others keep their activations. None recomputes all.
        activation_budget: with `compile_layers`, the compiler recomputes inside each layer instead: 0 keeps the
            layer's input only, 1 all that is expensive to compute. Gradient checkpointing then does nothing.
        seed: for new adapters. Values are those of `torch.manual_seed(seed); get_peft_model(...)` on one CPU
            process, for every number of ranks.
        revision, token, cache_dir, local_files_only, subfolder, trust_remote_code: as in `from_pretrained`.
        model_kwargs: `attn_implementation` and fields of the model's config, as in `from_pretrained`.

    Returns:
        A `PeftModel`, or without an adapter the transformers model, in eval mode, ready for a stock trainer. Under
        FSDP1 the trainer wraps it: until then rank 0 holds all values, and only `dequantize()` works on the others.
        `.load_report` says how many bytes are quantised, sharded and neither.

    Raises:
        ConfigError: a setting or a checkpoint that cannot be honoured; nothing has been read yet. On every rank.
        OSError: files that cannot be found or read. Ranks that had no such error raise RuntimeError quoting it.
    """
    started = time.perf_counter()
    name = os.fspath(model_name_or_path)
    numbers = resolve_precision(precision, dtype=dtype, adapter_dtype=adapter_dtype)
    engine = resolve_engine(fsdp)
    device = resolve_device()
    hub_kwargs = {"revision": revision, "token": token, "cache_dir": cache_dir,
                  "local_files_only": local_files_only, "subfolder": subfolder}  # fmt: skip
    adapter = AdapterSource(
        peft_config=peft_config, saved=adapter_name_or_path, is_trainable=is_trainable, dtype=numbers.adapter_dtype,
        seed=seed, hub_kwargs={"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only},
    )  # fmt: skip

    with same_outcome("preparing the model"):
        placement = resolve_offload(offload)
        if rotary is not None:
            check_load(
                peft_config, adapter_name_or_path, engine=engine, offload=placement, compile_layers=compile_layers
            )
            quantization_config = quantization_config or rotary.frozen_format
        check = partial(
            check_settings, engine=engine, device=device, numbers=numbers, offload=placement,
            offload_pin_memory=offload_pin_memory, replicate_head=replicate_head, embedding_on_host=embedding_on_host,
            rotary=rotary is not None, peft_config=peft_config, model_kwargs=model_kwargs,
        )  # fmt: skip
        check(quantization_config)
        model = build_skeleton(
            name, dtype=numbers.dtype, trust_remote_code=trust_remote_code, hub_kwargs=hub_kwargs,
            model_kwargs=model_kwargs,
        )  # fmt: skip
        check_wrapped_classes(model, name, engine=engine, device=device)
        stored_config = take_stored_config(model.config)
        if stored_config is not None:
            quantization_config = runtime_config(stored_config, quantization_config)
            check(quantization_config)
        storage_dtype = resolve_storage_dtype(quantization_config, engine, numbers.dtype)
        wanted = model.state_dict(keep_vars=True)
        layers = decoder_layers(model)
        set_layer_options(
            model, layers, engine=engine, compiled=compile_layers, checkpointed=checkpoint_layers,
            activation_budget=activation_budget,
        )  # fmt: skip
        kept: list[str] = []
        if quantization_config is not None and stored_config is None:
            kept = replace_linears(
                model,
                backend_for_config(quantization_config, numbers.dtype),
                skip_modules=skip_modules(quantization_config),
                storage_dtype=storage_dtype,
            )
    files = _download(name, hub_kwargs, sum(tensor.numel() * tensor.element_size() for tensor in wanted.values()))
    with same_outcome("matching the checkpoint to the model"):
        tensors = index_checkpoint(files)
        if stored_config is not None:
            tensors = pack_checkpoint(tensors, quantization_config, numbers.dtype)
        matched, unused = match_checkpoint(model, wanted, tensors)
        if stored_config is not None:
            kept = replace_packed_linears(model, matched, quantization_config, storage_dtype=storage_dtype)
        weights = [PlannedWeight(*_owner(model, key), tensor) for key, tensor in matched.items()]
        root = adapter.inject(model)
        if compile_layers:
            join_siblings(root, ADAPTER_NAME)
        whole: WholeParameters = {}
        if engine == "fsdp1":
            check_fsdp1(root, layers)
        if engine == "fsdp2" and rotary is None:
            whole = keep_whole(
                root, layers, device, replicate_head=replicate_head, embedding_on_host=embedding_on_host
            )
    if unused:
        logger.warning("The model has no use for %d tensors of the checkpoint: %s", len(unused), ", ".join(unused))
    adapter.warn_of_another_base(quantization_config, numbers.dtype)

    _shard_and_allocate(
        root, layers, engine=engine, numbers=numbers, offload=placement, pin_memory=offload_pin_memory, device=device,
        rows_only=rotary is not None, whole=whole,
    )  # fmt: skip
    with torch.no_grad():
        read_bytes = fill(weights, device=device)
        adapter.fill(root)

    _check_nothing_on_meta(root, holds_parameters=engine != "fsdp1" or rank() == 0)
    check_integrity(root, max_groups=CHECKED_GROUPS)
    check_replicas(root)
    stored = None if isinstance(root, PeftModel) else matched
    attach(root, engine=engine, precision=numbers, offload=placement, stored=stored)  # type: ignore[arg-type]
    remember_base(root, quantization_config, numbers.dtype)
    seconds = time.perf_counter() - started
    report = make_report(root, unquantized=kept, read_bytes=read_bytes, seconds=seconds)
    root.load_report = report  # type: ignore[assignment]  # nn.Module is typed as holding tensors and modules only
    logger.info("%s: %s", name, report.summary())
    return root


def _shard_and_allocate(
    root: nn.Module,
    layers: list[nn.Module],
    *,
    engine: Engine,
    numbers: Precision,
    offload: Offload,
    pin_memory: bool,
    device: torch.device,
    rows_only: bool,
    whole: WholeParameters,
) -> None:
    """Give every parameter storage, after sharding; under FSDP1 on rank 0 alone, which later fills the others."""
    mesh = make_mesh(device.type, resolve_replicas()) if engine == "fsdp2" else None
    if mesh is not None and rows_only:
        apply_fsdp2_to_rows(root, layers, mesh=mesh, reshard_after_forward=reshard_after_forward())
    elif mesh is not None:
        apply_fsdp2(
            root, layers, mesh=mesh, dtype=numbers.dtype, reduce_dtype=numbers.reduce_dtype, offload=offload,
            pin_memory=pin_memory, reshard_after_forward=reshard_after_forward(), whole=whole,
        )  # fmt: skip
    if engine == "fsdp1":
        share_rows(root, device)
    host = torch.device("cpu")
    with same_outcome("allocating the model"):
        if engine != "fsdp1" or rank() == 0:
            materialize(
                root,
                host if offload == "all" or engine == "fsdp1" else device,
                rows_device=None if offload == "none" else host,
                buffers_device=host if engine == "fsdp1" else device,
                pin_memory=pin_memory and device.type == "cuda",
                whole=whole,
            )


def _download(name: str, hub_kwargs: dict[str, Any], num_bytes: int) -> list[Any]:
    """The checkpoint's files; on each node one process downloads while the others wait, as long as that may take."""
    if on_any_rank(not os.path.isdir(name)):
        timeout_s = max(MIN_DOWNLOAD_TIMEOUT_S, num_bytes / SLOWEST_DOWNLOAD_BYTES_PER_S)
        with patient_ranks(timeout_s) as group, same_outcome("finding the checkpoint", group):
            if PartialState().is_local_main_process:
                find_checkpoint(name, **hub_kwargs)
    with same_outcome("finding the checkpoint"):
        return find_checkpoint(name, **hub_kwargs)


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), name


def _check_nothing_on_meta(model: nn.Module, *, holds_parameters: bool) -> None:
    named: list[tuple[str, torch.Tensor]] = [*model.named_buffers()]
    if holds_parameters:
        named += model.named_parameters()
    left = [name for name, tensor in named if tensor.is_meta]
    if left:
        raise RuntimeError(f"{len(left)} tensors have no values after loading, a bug of this package: {left[:5]}")
