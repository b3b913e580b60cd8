"""What a wheel holds, and that the command line and the shipped files work from where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("hf_fsdp_qlora", "recipes", "accelerate_configs", "setup.py", "setup.cfg", "pyproject.toml", "README.md",
           "LICENSE")  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package installed from a wheel into a folder of its own, away from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(wheel, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(built)], check=True)
    return target


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=site.parent
    )


def test_wheel_ships_every_config_recipe_and_module(site: Path) -> None:
    for folder in ("recipes", "accelerate_configs"):
        files = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.*") if path.suffix != ".pyc"}
        shipped = {path.relative_to(site / "hf_fsdp_qlora" / folder)
                   for path in (site / "hf_fsdp_qlora" / folder).rglob("*.*") if path.suffix != ".pyc"}  # fmt: skip
        assert len(files) >= 5
        assert shipped == files
    modules = {path.relative_to(ROOT) for path in (ROOT / "hf_fsdp_qlora").rglob("*.py")}
    assert modules <= {path.relative_to(site) for path in (site / "hf_fsdp_qlora").rglob("*.py")}
    assert not (site / "tests").exists() and not (site / "recipes").exists()


def test_shipped_files_are_found_by_name_from_an_installed_wheel(site: Path) -> None:
    code = """
from hf_fsdp_qlora.resources import *
print(find_accelerate_config("fsdp2"), find_recipe("llama/8b_nf4_fsdp2.yaml"), find_recipe("70b_two_24gb"))
print(sft_script())
"""
    result = run(site, "-c", code)
    assert result.returncode == 0, result.stderr
    paths = [Path(word) for word in result.stdout.split()]
    assert len(paths) == 4
    for path in paths:
        assert path.is_file() and path.is_relative_to(site)


def test_command_line_lists_its_commands_without_importing_torch(site: Path) -> None:
    code = """
import sys
from hf_fsdp_qlora.cli import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    result = run(site, "-c", code)
    assert result.returncode == 0, result.stderr
    for command in ("train", "env"):
        assert command in result.stdout


def test_env_prints_versions_as_json(site: Path) -> None:
    result = run(site, "-m", "hf_fsdp_qlora.cli", "env", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert {"packages", "system", "gpus", "free", "links", "limits", "problems"} <= set(facts)
    assert facts["packages"]["torch"] and facts["packages"]["hf-fsdp-qlora"]
    assert facts["system"]["memory_gib"] > 0


def test_train_launches_the_shipped_script_with_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fsdp_qlora import cli

    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    words = ["train", "--config", "llama/8b_nf4_fsdp2", "--lora_r", "8", "--packing"]
    assert cli.main([*words, "--accelerate_config", "fsdp2", "--num_processes", "4"]) == 0
    assert cli.main(words) == 0
    script = [str(ROOT / "recipes/sft.py"), "--config", str(ROOT / "recipes/llama/8b_nf4_fsdp2.yaml")]
    script += ["--lora_r", "8", "--packing"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/fsdp2.yaml")]
    assert commands == [[sys.executable, *launch, "--num_processes", "4", *script], [sys.executable, *script]]


def test_train_checks_both_configs_before_it_launches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_fsdp_qlora import cli

    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("launched"))
    words = ["train", "--config", "llama/8b_nf4_fsdp2", "--accelerate_config", "fsdp2"]
    assert cli.main([*words, "--lerning_rate", "1e-4"]) == 2
    assert "Did you mean 'learning_rate'?" in capsys.readouterr().err
    assert cli.main([*words, "--optim", "adamw_bnb_8bit"]) == 2
    assert "Set optim: adamw_torch_fused" in capsys.readouterr().err
    two_nodes = ["train", "--config", "llama/8b_nf4_fsdp2", "--accelerate_config", "multi_node"]
    assert cli.main([*two_nodes, "--num_processes", "4"]) == 2  # the file says 16
    assert "are not 4 processes" in capsys.readouterr().err
    assert cli.main(["train", "--config", "llama/8b_nf4_fsdp2", "--num_processes", "2"]) == 2
    assert "needs --accelerate_config" in capsys.readouterr().err


def test_command_line_reports_a_config_error_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    from hf_fsdp_qlora import cli

    assert cli.main(["train", "--config", "llama/8b_nf4"]) == 2
    assert "Did you mean 'llama/8b_nf4_fsdp2'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["env", "--jsn"])
    assert "unknown arguments: --jsn. Did you mean --json?" in capsys.readouterr().err


def test_command_line_reports_a_file_that_cannot_be_written_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig

    from hf_fsdp_qlora import cli

    LlamaConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    line = ["config", "--yes", "--model", str(tmp_path), "--gpus", "0", "--host-memory", "64GiB"]
    files = ["--accelerate-config", str(tmp_path / "file" / "a.yaml"), "--recipe", str(tmp_path / "file" / "r.yaml")]
    assert cli.main([*line, *files]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_ctrl_c_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_fsdp_qlora import cli
    from hf_fsdp_qlora.commands import env

    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "run", interrupted)
    assert cli.main(["env"]) == 130
