"""The files that start a run on a cluster say what they must; no scheduler is needed to see it."""

import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from nemo_like.config.command_line import parse
from nemo_like.config.grpo import GRPOTree

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "examples/cluster"
RECIPE = "recipes/llm/grpo-qwen3-8b-2n8g-fsdp2-async.yaml"


def tree_of(overrides):
    return parse(overrides, tree=GRPOTree, default_config=ROOT / "configs/grpo_math.yaml").tree


@pytest.fixture
def submit(tmp_path):
    """Runs the script as Slurm would, where `srun` ends with some exit code; what it called."""
    calls = tmp_path / "calls"
    for name in ("scontrol", "srun", "uv"):
        fake = tmp_path / name
        answer = 'echo "$0 $*" >> "$CALLS"\n'
        if name == "scontrol":
            answer += '[ "$1" = show ] && printf "node7\\nnode8\\n" || true\n'
        if name == "srun":
            answer += 'printf "%s\\n" "$@" > "$CALLS.srun"\nexit "$ENDS_WITH"\n'
        fake.write_text("#!/bin/bash\n" + answer)
        fake.chmod(0o755)

    def run(*, ends_with=0, seconds_left=7200):
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "ENDS_WITH": str(ends_with),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_JOB_END_TIME": str(int(time.time()) + seconds_left),
        }
        ended = subprocess.run(
            [FILES / "slurm.sh", "examples/run_grpo.py", "--config", RECIPE, "grpo.seed=7"],
            env=environment,
            capture_output=True,
            text=True,
        )
        srun = tmp_path / "calls.srun"
        words = srun.read_text().splitlines() if srun.exists() else []
        return ended, calls.read_text(), words

    return run


def test_a_slurm_job_runs_the_command_on_all_its_machines(submit):
    ended, _, words = submit()
    assert ended.returncode == 0, ended.stderr
    ray, run = words[: words.index("--")], words[words.index("--") + 1 :]
    assert ray[3:] == ["ray", "symmetric-run", "--address", "node7:6379", "--min-nodes", "2"]
    assert run[:2] == ["python", "examples/run_grpo.py"]
    tree = tree_of(run[2:])
    assert tree.cluster.address == "node7:6379"
    assert (tree.cluster.num_nodes, tree.cluster.gpus_per_node) == (2, 8)
    assert tree.grpo.seed == 7
    days, hours, minutes, _ = map(int, tree.checkpointing.checkpoint_must_save_by.split(":"))
    assert (days, hours) == (0, 1) and 40 <= minutes <= 45, "a quarter of an hour before the end"


@pytest.mark.parametrize(("ends_with", "again"), [(75, True), (0, False), (1, False)])
def test_a_slurm_job_is_queued_again_where_the_run_saved_and_was_not_done(submit, ends_with, again):
    ended, calls, _ = submit(ends_with=ends_with)
    assert ended.returncode == ends_with
    assert ("requeue 42" in calls) == again


def test_a_slurm_job_without_time_to_save_is_refused(submit):
    ended, _, words = submit(seconds_left=600)
    assert ended.returncode == 2 and "sbatch --time" in ended.stderr and not words


def test_the_manifest_asks_for_the_machines_that_its_run_needs():
    job = yaml.safe_load((FILES / "kuberay.yaml").read_text())["spec"]
    _, script, *overrides = shlex.split(job["entrypoint"])
    assert (ROOT / script).is_file()
    tree = tree_of(overrides)
    cluster = job["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert (workers["replicas"], gpus) == (tree.cluster.num_nodes, tree.cluster.gpus_per_node)
    assert f'"ray=={cluster["rayVersion"]}"' in (ROOT / "pyproject.toml").read_text()
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for folder in (tree.checkpointing.checkpoint_dir, tree.logger.log_dir):
        assert str(Path(folder).parent) in mounts, "pods go, and checkpoints stay"
