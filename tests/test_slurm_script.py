"""recipes/multi_node/train.slurm with stand-ins for SLURM's commands: what it would start on every node."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parents[1]
SRUN = '#!/bin/bash\nshift\nfor node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" || exit 1; done\n'
SCONTROL = '#!/bin/bash\n[ "$3" = "node[01-02]" ] && printf "node01\\nnode02\\n"\n'
ACCELERATE = '#!/bin/bash\nprintf "%s\\n" "$@" > "$RECORDS/$SLURM_NODEID"\n'


def started(folder: Path, nodes: int, *arguments: str) -> list[list[str]]:
    """The arguments of `accelerate` on each node."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("accelerate", ACCELERATE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "RECORDS": str(folder), "SLURM_GPUS_ON_NODE": "4",
           "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "node[01-02]", "SLURM_JOB_ID": "123456"}  # fmt: skip
    script = str(ROOT / "recipes/multi_node/train.slurm")
    subprocess.run(["bash", script, *arguments], env=env, cwd=ROOT, check=True, capture_output=True, text=True)
    return [(folder / str(node)).read_text().splitlines() for node in range(nodes)]


def test_every_node_gets_a_launcher_with_the_sizes_of_the_job(tmp_path: Path) -> None:
    recipe = "recipes/llama/70b_nf4_fsdp2.yaml"
    for node, (command, *line) in enumerate(started(tmp_path, 2, recipe, "--output_dir", "with space")):
        assert command == "launch"
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
        assert (args.machine_rank, args.num_machines, args.num_processes) == (node, 2, 8)
        assert (args.main_process_ip, args.main_process_port) == ("node01", 23456)
        env = prepare_multi_gpu_env(args)
        assert env["FSDP_VERSION"] == "2" and env["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
        assert [env[f"PARALLELISM_CONFIG_DP_{name}_SIZE"] for name in ("REPLICATE", "SHARD")] == ["2", "4"]
        assert args.training_script == "recipes/sft.py"
        expected = ["--config", recipe, "--resume_from_checkpoint", "auto", "--output_dir", "with space"]
        assert args.training_script_args == expected


def test_one_node_needs_no_replicas(tmp_path: Path) -> None:
    [line] = started(tmp_path, 1, "demo/sft")
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line[1:]))
    assert (args.num_machines, args.num_processes, args.use_parallelism_config) == (1, 4, False)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        started(tmp_path, 2)
    assert "usage: sbatch train.slurm RECIPE" in error.value.stderr
