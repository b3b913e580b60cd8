"""The pages in docs/ and the README: what they quote, name and link exists, and their tables are the planner's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from hf_fsdp_qlora import distributed, integrity
from hf_fsdp_qlora.cli import main
from hf_fsdp_qlora.config import recipe_fields
from hf_fsdp_qlora.integrity import IntegrityError, check_integrity
from hf_fsdp_qlora.validation import ModelFacts, Run, find_problems
from hf_fsdp_qlora.validation_model_rules import wrapped_classes_exist

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ACCELERATE_KEYS = re.compile(r"fsdp_\w+|mixed_precision|num_processes|main_process_(ip|port)")


def test_pages_are_found_and_linked_from_the_readme() -> None:
    names = {path.name for path in PAGES}
    assert names >= {"what_fits.md", "troubleshooting.md", "how_it_works.md", "migration.md", "adding_a_backend.md"}
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [name for name in names - {"README.md"} if f"(docs/{name})" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing


def commands() -> list[tuple[str, str]]:
    """Every `hf-fsdp-qlora ...` and `accelerate launch ...` line of a fenced block, with continued lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("hf-fsdp-qlora ", "accelerate launch ")):
                    found.append((page.name, line))
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: str(value)[:40])
def test_commands_name_options_and_files_that_exist(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    if words[0] == "accelerate":
        config = ROOT / words[words.index("--config_file") + 1]
        assert config.is_file()
        script = next(index for index, word in enumerate(words) if word.endswith(".py"))
        launch_command_parser().parse_args(words[2:])  # ends the process where it does not know an option
        keys = {word[2:] for word in words[script:] if word.startswith("--")} - {"config"}
        assert keys <= set(recipe_fields())
        return
    ran = []
    module = sys.modules.get(f"hf_fsdp_qlora.commands.{words[1]}") or __import__(
        f"hf_fsdp_qlora.commands.{words[1]}", fromlist=["run"]
    )
    monkeypatch.setattr(module, "run", lambda args: ran.append(args))
    assert main(words[1:]) == 0  # an unknown option would end the process with status 2
    keys = {word[2:] for word in ran[0].rest if word.startswith("--")}
    assert keys <= set(recipe_fields())


def test_enough_commands_are_found() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("line", ["fsdp2 llama/8b_nf4_fsdp2", "fsdp2_offload alpaca/70b_two_24gb"])
def test_the_pairs_that_the_pages_validate_are_valid(line: str) -> None:
    accelerate, recipe = line.split()
    assert any(f"--accelerate_config {accelerate} --config {recipe}" in text for _, text in commands())
    assert find_problems(accelerate, recipe).problems == []


def test_migration_names_keys_that_exist() -> None:
    fields, looked_up = recipe_fields(), 0
    for line in (ROOT / "docs" / "migration.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split(" | ")]
        if not line.startswith("| ") or len(cells) != 2:
            continue
        for code in re.findall(r"`([^`]+)`", cells[1]):
            match = re.fullmatch(r"([a-z_0-9]+)(: .+)?", code)
            if match is None or match[1] in ("peft_config",):
                continue
            looked_up += 1
            assert match[1] in fields or ACCELERATE_KEYS.fullmatch(match[1]), code
            path = re.fullmatch(r"accelerate_configs/\w+\.yaml", code)
            assert path is None or (ROOT / code).is_file()
    assert looked_up > 50


def test_what_fits_is_what_the_planner_says() -> None:
    script = ROOT / "benchmarks" / "what_fits.py"
    printed = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True, cwd=ROOT)
    page = (ROOT / "docs" / "what_fits.md").read_text(encoding="utf-8")
    tables = page.split("<!-- made by benchmarks/what_fits.py -->")[1].split("<!-- end -->")[0]
    assert printed.stdout.strip() == tables.strip(), "python benchmarks/what_fits.py --write"


FSDP2: dict[str, Any] = dict(
    distributed_type="FSDP", num_processes=2, mixed_precision="bf16",
    fsdp_config=dict(fsdp_version=2, fsdp_auto_wrap_policy="NO_WRAP", fsdp_reshard_after_forward=True),
)  # fmt: skip
FSDP1: dict[str, Any] = FSDP2 | dict(
    fsdp_config=dict(fsdp_version=1, fsdp_sync_module_states=True, fsdp_cpu_ram_efficient_loading=True)
)
RECIPE: dict[str, Any] = dict(use_peft=True, load_in_4bit=True, dtype="bfloat16", bf16=True, max_length=512)


def with_fsdp(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return config | {"fsdp_config": config["fsdp_config"] | changes}


def rule_messages() -> list[str]:
    """What `validate` says of the settings that the page is about."""
    runs = [
        (FSDP1, RECIPE | dict(bnb_4bit_quant_storage="float32")),
        (FSDP2, RECIPE | dict(bnb_4bit_quant_storage="bfloat16")),
        (FSDP2, RECIPE | dict(load_in_4bit=False, load_in_8bit=True)),
        (FSDP2, RECIPE | dict(model_init_kwargs={"device_map": "auto"})),
        (with_fsdp(FSDP1, fsdp_sync_module_states=False, fsdp_cpu_ram_efficient_loading=False), RECIPE),
        (FSDP2, RECIPE | dict(optim="paged_adamw_8bit")),
        (with_fsdp(FSDP2, fsdp_activation_checkpointing=True), RECIPE),
    ]
    messages = [problem.why for accelerate, recipe in runs for problem in find_problems(accelerate, recipe).problems]
    wrapping = with_fsdp(
        FSDP2, fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP", fsdp_transformer_layer_cls_to_wrap="LlamaDecodeLayer"
    )
    facts = ModelFacts("tiny", frozenset({"LlamaDecoderLayer"}), "bfloat16", None)
    problem = wrapped_classes_exist(Run(wrapping, RECIPE, facts))
    assert problem is not None
    return [*messages, problem.why]


def damage_message(monkeypatch: pytest.MonkeyPatch) -> str:
    """What a changed byte raises."""
    rows = torch.zeros(2, 64, dtype=torch.uint8)
    layer = SimpleNamespace(weight=rows, weight_stats=rows, row_fingerprints=torch.ones(2, dtype=torch.int64))
    monkeypatch.setattr(integrity, "gathered_rows", lambda model: iter([[layer]]))
    model = SimpleNamespace(named_modules=lambda: [("layers.0.q_proj", layer)])
    with pytest.raises(IntegrityError) as caught:
        check_integrity(model)  # type: ignore[arg-type]
    return str(caught.value)


def other_rank_message(monkeypatch: pytest.MonkeyPatch) -> str:
    """What a rank raises when another one failed."""

    def gather(reports: list[str | None], own: str | None, *_: Any, **__: Any) -> None:
        reports[:] = [own, "ValueError: the disk is full"]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    with pytest.raises(RuntimeError) as caught, distributed.same_outcome("reading"):
        pass
    return str(caught.value)


def test_quoted_messages_are_what_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [" ".join(block.split()) for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL)]
    raised = [*rule_messages(), damage_message(monkeypatch), other_rank_message(monkeypatch)]
    missing = [quote for quote in quoted if not any(quote in message for message in raised)]
    assert len(quoted) == len(raised) == 10
    assert not missing
    assert page.count("\n## ") == 12
