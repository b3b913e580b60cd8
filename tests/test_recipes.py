"""Every shipped recipe and accelerate config is read by what will read it, and the script's parts do what they say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_fsdp_qlora.config import Recipe, load_recipe
from hf_fsdp_qlora.data import load_datasets, load_tokenizer
from hf_fsdp_qlora.distributed import check_same, rank
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.quantization import DynamicInt8Config, LinearInt8Config
from hf_fsdp_qlora.resources import accelerate_config_names, find_accelerate_config, find_recipe, recipe_names
from hf_fsdp_qlora.train import parse_recipe, quantization_config, resume_point
from recipes.demo.base_model import _train_tokenizer
from tests.distributed import run_distributed

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").rglob("*.yaml"))


def test_every_recipe_and_config_is_found() -> None:
    assert len(RECIPES) == len(recipe_names()) == 9
    assert len(ACCELERATE_CONFIGS) == len(accelerate_config_names()) == 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_header_says_what_it_needs(path: Path) -> None:
    recipe = load_recipe(path)
    formats = [recipe.get(key) for key in ("load_in_4bit", "int8_type", "hqq_nbits") if recipe.get(key)]
    trained = [recipe.get(key) for key in ("use_peft", "rotary_active") if recipe.get(key)]
    assert len(trained) == 1 and recipe.script_args.dataset_name
    assert len(formats) == (0 if recipe.get("rotary_active") else 1)
    header = path.read_text().split("model_name_or_path")[0]
    for part in ("GPUs:", "Command:", "Memory:"):
        assert part in header
    assert find_recipe(path.relative_to(ROOT / "recipes").with_suffix("")) == path


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_config_and_sets_fsdp(path: Path) -> None:
    config = load_config_from_file(str(path))
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "x.py"]))
    assert args.use_fsdp == ("fsdp" in path.stem or path.stem == "multi_node")
    for part in ("For:", "Needs:", "Run:"):
        assert part in path.read_text()
    if args.use_fsdp:
        # A key that accelerate does not know is dropped in silence, so what it passes on is what counts.
        env = prepare_multi_gpu_env(args)
        version = "1" if path.stem.startswith("fsdp1") else "2"
        assert (env["FSDP_VERSION"], env["FSDP_AUTO_WRAP_POLICY"]) == (version, "NO_WRAP")
        # FSDP1's other ranks get their values from rank 0; under FSDP2 there is nothing to broadcast.
        assert env["FSDP_CPU_RAM_EFFICIENT_LOADING"] == str(version == "1").lower()
        assert version == "2" or (env["FSDP_SYNC_MODULE_STATES"], env["FSDP_USE_ORIG_PARAMS"]) == ("true", "false")
        assert env["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
        assert env["FSDP_OFFLOAD_PARAMS"] == str("offload" in path.stem).lower()
        known = vars(launch_command_parser().parse_args(["x.py"]))
        assert not set(config.fsdp_config) - set(known)
        replicas, shards = (env.get(f"PARALLELISM_CONFIG_DP_{name}_SIZE", "1") for name in ("REPLICATE", "SHARD"))
        assert (replicas, shards) == (("2", "8") if path.stem == "multi_node" else ("1", "1"))


def test_configs_are_found_by_name_with_the_nearest_name_in_the_error() -> None:
    path = ROOT / "accelerate_configs" / "fsdp2.yaml"
    for name in ("fsdp2", "fsdp2.yaml", path, "accelerate_configs/fsdp2.yaml"):
        assert find_accelerate_config(name).resolve() == path
    with pytest.raises(ConfigError, match="Did you mean 'fsdp2_offload'"):
        find_accelerate_config("fsdp2_ofload")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 tokens beside the config of a model with 304 embedding rows; no weights."""
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("model")
    tokenizer = _train_tokenizer(["some text to split into pairs of bytes " * 20] * 3)
    tokenizer.save_pretrained(path)
    LlamaConfig(vocab_size=len(tokenizer) + 4, dtype="float16").save_pretrained(path)
    return path


def make_recipe(tmp_path: Path, model_path: Path, **values: object) -> Recipe:
    values = {"model_name_or_path": str(model_path), "bf16": False, "output_dir": str(tmp_path), **values}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path)


ROWS = {
    "text": {"text": "a b c"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_load_datasets_reads_local_files_in_every_form(
    tmp_path: Path, model_path: Path, form: str, suffix: str
) -> None:
    from datasets import Dataset

    path = tmp_path / f"data{suffix}"
    rows = Dataset.from_list([ROWS[form]] * 3)
    rows.to_parquet(path) if suffix == ".parquet" else rows.to_json(path)
    recipe = make_recipe(tmp_path, model_path, dataset_name=str(path), do_eval=True, eval_dataset_name=str(path))
    tokenizer = load_tokenizer(recipe)
    tokenizer.chat_template = "{{ messages }}"
    train, evaluation = load_datasets(recipe, tokenizer)
    assert evaluation is not None
    assert list(train) == list(evaluation) == [ROWS[form]] * 3


def test_load_datasets_reads_csv_folders_slices_and_alpaca(tmp_path: Path, model_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.csv").write_text("instruction,input,output\nAdd.,1 2,3\nSay hi.,,hi\n")
    recipe = make_recipe(
        tmp_path, model_path, dataset_name=str(folder), dataset_format="alpaca", do_eval=True,
        dataset_train_split="train[:1]", dataset_test_split="train[1:]",
    )  # fmt: skip
    train, evaluation = load_datasets(recipe, load_tokenizer(recipe))
    assert evaluation is not None
    row, other = next(iter(train)), next(iter(evaluation))
    assert row["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert (row["completion"], other["completion"]) == ("3", "hi")
    assert "### Input" not in other["prompt"]


def test_load_datasets_refuses_what_the_trainer_would_not_understand(tmp_path: Path, model_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "a"}) + "\n")
    recipe = make_recipe(tmp_path, model_path, dataset_name=str(path))
    with pytest.raises(ConfigError, match=r"columns \['question'\]"):
        load_datasets(recipe, load_tokenizer(recipe))
    path.write_text(json.dumps(ROWS["messages"]) + "\n")
    recipe = make_recipe(tmp_path, model_path, dataset_name=str(path))
    with pytest.raises(ConfigError, match="no chat template"):
        load_datasets(recipe, load_tokenizer(recipe))
    with pytest.raises(ConfigError, match="no file"):
        recipe = make_recipe(tmp_path, model_path, dataset_name="missing.jsonl")
        load_datasets(recipe, load_tokenizer(recipe))


def test_load_tokenizer_says_what_cannot_be_read(tmp_path: Path, model_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer of .*nowhere' cannot be read"):
        load_tokenizer(make_recipe(tmp_path, tmp_path / "nowhere"))
    shutil.copytree(model_path, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match="tokenizer of .*bare' cannot be read"):
        load_tokenizer(make_recipe(tmp_path, tmp_path / "bare"))


@pytest.mark.parametrize("num_tokens", [4, 5])
def test_load_tokenizer_clones_a_chat_template_or_refuses_rows_that_are_missing(
    tmp_path: Path, model_path: Path, num_tokens: int
) -> None:
    from transformers import AutoTokenizer

    source = AutoTokenizer.from_pretrained(model_path)
    source.add_tokens([f"<turn{i}>" for i in range(num_tokens)])
    source.eos_token = "<turn0>"
    source.chat_template = "{% for m in messages %}<turn1>{{ m.content }}<turn0>{% endfor %}"
    source.save_pretrained(tmp_path / "source")
    recipe = make_recipe(tmp_path, model_path, chat_template_path=str(tmp_path / "source"))
    if num_tokens > 4:  # the model has four spare rows
        with pytest.raises(ConfigError, match="cannot be resized"):
            load_tokenizer(recipe)
        return
    tokenizer = load_tokenizer(recipe)
    assert tokenizer.chat_template == source.chat_template
    assert tokenizer.eos_token == recipe.training_args.eos_token == "<turn0>"
    assert recipe.training_args.chat_template_path is None


def test_quantization_config_follows_the_recipe_and_the_checkpoints_dtype(tmp_path: Path, model_path: Path) -> None:
    import torch

    recipe = make_recipe(tmp_path, model_path, load_in_4bit=True, use_bnb_nested_quant=True, dtype="auto")
    config = quantization_config(recipe)
    assert config is not None
    assert config.bnb_4bit_use_double_quant and config.bnb_4bit_compute_dtype == torch.float16


def test_quantization_config_takes_int8_and_hqq(tmp_path: Path, model_path: Path) -> None:
    def config(**values: object) -> Any:
        return quantization_config(make_recipe(tmp_path, model_path, **values))

    for name, config_class in (("linear", LinearInt8Config), ("dynamic", DynamicInt8Config)):
        made = config(int8_type=name, int8_block_size=64)
        assert type(made) is config_class and made.block_size == 64 and made.modules_to_not_convert is None
    assert config(int8_type="linear").block_size == 128
    made = config(hqq_nbits=3, hqq_group_size=32, hqq_axis=0)
    settings = made.quant_config["weight_quant_params"]
    assert (settings["nbits"], settings["group_size"], settings["axis"]) == (3, 32, 0)
    assert config() is None
    with pytest.raises(
        ConfigError, match=r"hqq_nbits: 4\n.*load_in_4bit is set too.*\n.*Remove load_in_4bit or hqq_nb"
    ):
        config(load_in_4bit=True, hqq_nbits=4)
    with pytest.raises(ConfigError, match="hqq_axis: 0\n.*no effect without hqq_nbits"):
        config(load_in_4bit=True, hqq_axis=0)
    with pytest.raises(ConfigError, match="hqq_nbits=5.*invalid choice"):
        config(hqq_nbits=5)


def test_resume_point_means_last_complete_given_or_none(
    tmp_path: Path, model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def point(value: str) -> str | None:
        return resume_point(make_recipe(tmp_path, model_path, resume_from_checkpoint=value).training_args)

    assert point("auto") is None and point("false") is None
    (tmp_path / "checkpoint-20").mkdir()  # its save was cut short
    (tmp_path / "checkpoint-30").mkdir()  # so was this one's, while the last file was written
    (tmp_path / "checkpoint-30" / ".saving").touch()
    (tmp_path / "checkpoint-30" / "trainer_state.json").write_text('{"global_step"')
    with pytest.raises(ConfigError, match="has no complete checkpoint"):
        point("true")
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    caplog.clear()
    assert point("true") == point("auto") == str(tmp_path / "checkpoint-10")
    assert "checkpoint-20" in caplog.text
    assert point(str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")
    with pytest.raises(ConfigError, match="is no folder"):
        point("checkpoint-7")


def _found_on_one_node_alone(output_dir: str, model_path: str) -> str:
    folder = Path(output_dir) / f"rank{rank()}"
    folder.mkdir()
    if rank() == 0:
        (folder / "checkpoint-5").mkdir()
        (folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    point = resume_point(make_recipe(folder, Path(model_path), resume_from_checkpoint="auto").training_args)
    try:
        check_same("the checkpoint to resume from", point)
    except ConfigError as error:
        return str(error)
    return "resumed"


def test_ranks_do_not_resume_from_different_checkpoints(tmp_path: Path, model_path: Path) -> None:
    for said in run_distributed(_found_on_one_node_alone, str(tmp_path), str(model_path)):
        assert re.search(r"the checkpoint to resume from is \S*checkpoint-5 for rank 0 and None for rank 1", said)


def test_parse_recipe_needs_a_model_data_and_something_to_train(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("lora_r: 8\n")
    with pytest.raises(ConfigError, match="does not set model_name_or_path and dataset_name"):
        parse_recipe(["--config", str(path)])
    with pytest.raises(ConfigError, match="Nothing would be trained"):
        parse_recipe(["--config", str(path), "--model_name_or_path", "m", "--dataset_name", "d"])
