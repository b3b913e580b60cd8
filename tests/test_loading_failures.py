"""load_model when something fails on one rank: it is that error on every rank, and nobody hangs."""

from __future__ import annotations

import os
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import BitsAndBytesConfig

from hf_fsdp_qlora import ConfigError, QuantizedLinear, load_model, loading
from hf_fsdp_qlora.integrity import IntegrityError, check_integrity
from hf_fsdp_qlora.sharding import local_tensor
from tests.distributed import run_distributed
from tests.loading_story import CPU, FSDP2, LORA, nf4
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama", shard_size="100KB")


def damage_one_row(path: str) -> str:
    model = load_model(path, quantization_config=nf4(), peft_config=LORA)
    total = check_integrity(model)
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    if dist.get_rank() == 0:
        local = local_tensor(layer.weight).view(torch.uint8)
        local[0, 0] ^= 1
    with pytest.raises(IntegrityError, match="1 of") as caught:
        check_integrity(model)
    return f"{total} {caught.value}"


@pytest.mark.parametrize("env", [FSDP2, CPU], ids=["fsdp2", "ddp"])
def test_one_changed_bit_is_an_integrity_error_on_every_rank(llama: Path, env: dict[str, str]) -> None:
    """Under DDP rank 1 has good rows, and hears of rank 0's."""
    first, second = run_distributed(damage_one_row, str(llama), env=env)
    assert "On rank 0" not in first and ("On rank 0" in second) == (env is CPU)
    for message in (first, second):
        assert message.split()[0] == str(2 * (4 + 3 * 2)) and "q_proj" in message


def load_own_path(paths: list[str]) -> str:
    with pytest.raises((ConfigError, RuntimeError, OSError)) as caught:
        load_model(paths[dist.get_rank()], quantization_config=nf4(), peft_config=LORA)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_error_on_one_rank_reaches_every_rank(llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    last = sorted(broken.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1000])
    first, second = run_distributed(load_own_path, [str(llama), str(broken)], env=FSDP2, timeout_s=60)
    assert first.startswith("RuntimeError") and "rank 1" in first and "truncated" in first
    assert second.startswith("ConfigError") and "Download it again" in second


def shrink_while_reading(path: str) -> str:
    from hf_fsdp_qlora import checkpoint

    if dist.get_rank() == 1:  # the file ends earlier than its header said, on this node only
        preadv = os.preadv

        def shorter(file: int, buffers: Any, offset: int) -> int:
            return 0 if offset > 50_000 else preadv(file, buffers, offset)

        checkpoint.os.preadv = shorter  # type: ignore[assignment]
    with pytest.raises((RuntimeError, OSError)) as caught:
        load_model(path, quantization_config=nf4(), peft_config=LORA)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_read_error_in_the_middle_of_the_stream_hangs_nobody(llama: Path) -> None:
    first, second = run_distributed(shrink_while_reading, str(llama), env=FSDP2, timeout_s=60)
    assert "rank 1" in first and "unexpected end of file" in first
    assert second.startswith("OSError")


def run_out_of_memory(path: str, where: str, config: BitsAndBytesConfig) -> str:
    from hf_fsdp_qlora import loading
    from hf_fsdp_qlora import weights as stream
    from hf_fsdp_qlora.quantization.bitsandbytes import FourBitBackend

    calls = [0]
    stock = FourBitBackend.quantize

    def quantize(self: Any, weights: Tensor, numel: int, gather_rows: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3 and where == "before the gather":
            raise torch.OutOfMemoryError("no memory left")
        rows = stock(self, weights, numel, gather_rows)
        if calls[0] == 3 and where == "after the gather":
            raise torch.OutOfMemoryError("no memory left")
        return rows

    def materialize(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    def fingerprint(codes: Tensor, stats: Tensor) -> Tensor:
        if calls[0] >= 3 and len(codes):
            raise ValueError("no memory left")  # a backend's errors are of any type
        return made(codes, stats)

    made = stream.fingerprint
    if dist.get_rank() == 1:
        if where == "fingerprinting":
            stream.fingerprint = fingerprint
        if where == "allocating":
            loading.materialize = materialize
        FourBitBackend.quantize = quantize  # type: ignore[method-assign]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        load_model(path, quantization_config=config, peft_config=LORA)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("where", ["before the gather", "after the gather", "fingerprinting", "allocating"])
def test_out_of_memory_on_one_rank_hangs_nobody(llama: Path, where: str, nested: bool) -> None:
    config = nf4(bnb_4bit_use_double_quant=nested)
    first, second = run_distributed(run_out_of_memory, str(llama), where, config, env=FSDP2, timeout_s=60)
    assert "rank 1" in first and "no memory left" in first
    assert second == ("ValueError" if where == "fingerprinting" else "OutOfMemoryError") + ": no memory left"


def load_slowly(name: str, cache_dir: str) -> int:
    """A hub model that takes longer to download than the process group waits."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=4))
    stock = loading.find_checkpoint

    def find_checkpoint(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 0 and not waited:
            waited.append(True)
            time.sleep(8)
        return stock(*args, **kwargs)

    waited: list[bool] = []
    loading.find_checkpoint = find_checkpoint
    model = load_model(name, quantization_config=nf4(), cache_dir=cache_dir, local_files_only=True)
    return len(waited) + model.load_report.quantized_layers


def test_ranks_wait_for_a_download_longer_than_their_time_out(llama: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--someone--tiny"
    shutil.copytree(llama, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    counts = run_distributed(load_slowly, "someone/tiny", str(tmp_path), env=FSDP2, process_group=False)
    assert counts == [15, 14]  # layers, and one wait on the rank that downloads
