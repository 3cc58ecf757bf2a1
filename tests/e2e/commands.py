"""The examples with settings small enough for a test: here, forked, or as a command."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_like.errors import EXIT_INTERRUPTED

REPOSITORY = Path(__file__).parents[2]
SCRIPT = "examples/run_sft.py"
GRPO_SCRIPT = "examples/run_grpo.py"
EVAL_SCRIPT = "examples/run_eval.py"
SMALL = (
    "cluster.launcher=local", "policy.train_global_batch_size=8", "policy.train_micro_batch_size=4",
    "data.train.num_rows=200", "data.validation.num_rows=16", "sft.val_period=0",
    "sft.val_at_start=false", "sft.val_at_end=false", "sft.val_num_answers=0",
    "checkpointing.metric_name=null", "checkpointing.keep_top_k=null",
)  # fmt: skip
"""A step takes some 30 ms; later overrides of the same keys win."""
SMALL_GRPO = (
    "cluster.launcher=local", "policy.generation.backend=hf", "policy.generation.max_new_tokens=24",
    "policy.train_global_batch_size=16", "policy.train_micro_batch_size=8",
    "data.train.num_rows=64", "data.validation.num_rows=8", "grpo.num_prompts_per_step=4",
    "grpo.num_generations_per_prompt=4", "grpo.val_period=0", "grpo.val_at_start=false",
    "grpo.val_at_end=false", "checkpointing.metric_name=null", "checkpointing.keep_top_k=null",
)  # fmt: skip
"""The same of the algorithms that draw their own data, with the engine that is in this process."""
TIMINGS = ("timing/", "performance/", "time")
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Place:
    """Where the runs of one test write."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def argv(self, *overrides: str) -> list[str]:
        """Of a small supervised run here."""
        return [*SMALL, *self.folders, *overrides]

    def grpo_argv(self, *overrides: str) -> list[str]:
        """Of a small run of GRPO here."""
        return [*SMALL_GRPO, *self.folders, *overrides]

    @property
    def folders(self) -> tuple[str, ...]:
        """Where checkpoints and logs go."""
        return (
            f"checkpointing.checkpoint_dir={self.checkpoints}",
            f"logger.log_dir={self.root / 'logs'}",
        )

    def supervised_config(self, num_steps: int) -> str:
        """The file of a supervised run here, for `policy.sft_config`."""
        return f"""
defaults: [sft_tiny, _self_]
sft: {{max_num_steps: {num_steps}, val_period: 0, val_at_start: false, val_at_end: false}}
cluster: {{launcher: local}}
checkpointing: {{checkpoint_dir: {self.checkpoints}, metric_name: null}}
logger: {{log_dir: {self.root / "logs"}}}
"""

    def steps(self) -> list[int]:
        from nemo_like.checkpoint.layout import find_steps

        return find_steps(self.checkpoints)

    def step(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    @property
    def log(self) -> Path:
        """The log folder of the only run here."""
        (folder,) = (self.root / "logs").iterdir()
        return folder

    def logged(self) -> list[dict[str, Any]]:
        file = self.root / "logs" / "exp_001" / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]]

    def values(self) -> list[dict[str, Any]]:
        """What was logged, without how long it took."""
        return [
            {k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in self.logged()
        ]

    def losses(self) -> list[float]:
        return [line["train/loss"] for line in self.logged() if "train/loss" in line]


def sft(argv: list[str]) -> int:
    """The exit code of `examples/run_sft.py`, run inside this process."""
    from nemo_like.config.sft import SFTTree

    def run() -> Any:
        from nemo_like.run.sft import run_sft

        return run_sft

    return _here(SCRIPT, argv, SFTTree, "configs/sft_tiny.yaml", run)


def grpo(argv: list[str]) -> int:
    """The exit code of `examples/run_grpo.py`, run inside this process."""
    from nemo_like.config.grpo import GRPOTree

    def run() -> Any:
        from nemo_like.run.grpo import run_grpo

        return run_grpo

    return _here(GRPO_SCRIPT, argv, GRPOTree, "configs/grpo_math.yaml", run)


def evaluation(argv: list[str]) -> int:
    """The exit code of `examples/run_eval.py`, run inside this process."""
    from nemo_like.config.grpo import GRPOTree

    def run() -> Any:
        from nemo_like.run.evaluate import run_evaluate

        return run_evaluate

    return _here(EVAL_SCRIPT, argv, GRPOTree, "configs/eval_math.yaml", run)


def _here(script: str, argv: list[str], tree: Any, config: str, run: Callable[[], Any]) -> int:
    from nemo_like.run.main import main

    def no_dry_run() -> Any:
        raise AssertionError("not asked for")

    before, sys.argv = sys.argv, [script, *argv]
    try:
        return main(argv, tree=tree, default_config=Path(config), run=run, dry_run=no_dry_run)
    finally:
        sys.argv = before


def start_fork(argv: list[str], output: Path, command: Callable[[list[str]], int] = sft) -> Any:
    """The same in a process of its own, which begins in a second because it is forked warm."""
    _CONTEXT.set_forkserver_preload(["tests.e2e.warm"])
    process = _CONTEXT.Process(target=_forked, args=(command, argv, str(output)))
    process.start()
    return process


def _forked(command: Callable[[list[str]], int], argv: list[str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(command(argv))


def start(argv: list[str], script: str = SCRIPT) -> subprocess.Popen[str]:
    """The real command, as a user's shell starts it."""
    return subprocess.Popen(
        [sys.executable, script, *argv],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(
    condition: Callable[[], Any], *, timeout_s: float = 120.0, every_s: float = 0.02
) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(every_s)
    raise TimeoutError("what was waited for did not happen")


def words(output: str) -> str:
    """What was said, without the line breaks and columns of the terminal."""
    return " ".join(output.split())


def contents(folder: Path, *parts: str) -> dict[str, bytes]:
    """Every byte below these parts of a checkpoint, by file."""
    files = [f for part in parts for f in sorted((folder / part).rglob("*")) if f.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


ONE_STEP_AT_A_TIME = "checkpointing.checkpoint_must_save_by=00:00:00:00"


def continues_exactly(
    command: Callable[[list[str]], int],
    argv_of: Callable[[Place], list[str]],
    root: Path,
    steps: int,
) -> Place:
    """A run in one go, after it was compared with the same run stopped after every step."""
    straight, broken = Place(root / "straight"), Place(root / "broken")
    state = ("model", "optimizer", "rng", "routing.json", "hf")
    assert command(argv_of(straight)) == 0
    for done in range(1, steps):
        assert command([*argv_of(broken), ONE_STEP_AT_A_TIME]) == EXIT_INTERRUPTED
        assert broken.steps() == list(range(1, done + 1))
    assert command(argv_of(broken)) == 0

    assert straight.steps() == broken.steps() == list(range(1, steps + 1))
    for step in straight.steps():
        expected = contents(straight.step(step), *state)
        found = contents(broken.step(step), *state)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == [], f"step {step}"
    assert broken.values() == straight.values()
    assert [line["step"] for line in straight.values()] == list(range(1, steps + 1))
    return straight
