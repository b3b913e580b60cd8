"""Machines where Triton is installed and cannot launch: said early, and bitsandbytes' kernels take over."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_fsdp_qlora import layer_options
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.quantization import backend_for_config, four_bit_kernel, triton_build, triton_lacks
from tests.lora_models import bnb_config


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that lacks nothing; its folder of headers."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(triton_build, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_build.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang" else None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_nothing_is_lacking(complete: Path) -> None:
    assert triton_lacks() is None


def test_no_triton(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_build, "find_spec", lambda name: None)
    assert triton_lacks() == "it is not installed"


def test_no_compiler_unless_cc_names_one(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_build.shutil, "which", lambda name: None)
    assert "install gcc" in (triton_lacks() or "")
    monkeypatch.setenv("CC", "/opt/cc")
    assert triton_lacks() is None


def test_no_headers_unless_the_compiler_is_told_where(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (complete / "Python.h").unlink()
    assert f"no Python.h in {complete}" in (triton_lacks() or "")
    monkeypatch.setenv("CPATH", "/opt/include")
    assert triton_lacks() is None


def test_the_kernel_is_left_alone_and_bitsandbytes_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(four_bit_kernel, "LACKS", "there is no C compiler; install gcc")
    codes: Any = SimpleNamespace(is_cuda=True)
    assert not four_bit_kernel.available(codes)
    monkeypatch.setattr(four_bit_kernel, "prepare", lambda *_: None)
    monkeypatch.setattr("hf_fsdp_qlora.quantization.bitsandbytes.dynamic_map", lambda device: None)
    backend = backend_for_config(bnb_config(), torch.bfloat16)
    backend.prepare(torch.device("cpu"))
    assert not caplog.messages
    backend.prepare(torch.device("cuda"))
    [message] = caplog.messages
    assert "install gcc. 4-bit weights are dequantised by bitsandbytes" in message


def test_layers_are_not_compiled_where_the_first_step_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(layer_options, "triton_lacks", lambda: "there is no C compiler; install gcc")
    model: Any = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="install gcc; or leave compile_layers and"):
        layer_options.set_layer_options(model, [model], engine="none", compiled=True, checkpointed=None)
