"""AdamW and Muon on the same work: rates swept for both, three seeds, raw numbers kept.

    uv run tools/studies/adamw_vs_muon.py run sft grpo --jobs 2
    uv run tools/studies/adamw_vs_muon.py run gsm8k --gsm8k FOLDER   # train.jsonl and test.jsonl
    uv run tools/studies/adamw_vs_muon.py report                     # tables and pictures again

Every run is a command of `examples/`, in one process (`cluster.launcher=local`). What is in
docs/studies/adamw_vs_muon already is not run again: a study that was ended goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from nemo_like.observability.curves import Chart, Series
from nemo_like.observability.plots import save_picture
from nemo_like.observability.run_folder import read_lines

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "docs/studies/adamw_vs_muon"
PAGE = ROOT / "docs/muon-evidence.md"
SEEDS = (1, 2, 3)
WINDOW = 10
"""Steps whose training loss is kept as one mean."""


@dataclass(frozen=True)
class Task:
    """What is trained, at which rates, and what counts in the end."""

    title: str
    script: str
    algorithm: str
    rates: dict[str, tuple[float, ...]]
    metric: str
    is_loss: bool
    overrides: tuple[str, ...] = ()

    def best(self, values: dict[float, float]) -> float:
        """The rate with the best value; one whose run diverged has none."""
        finite = {rate: value for rate, value in values.items() if math.isfinite(value)}
        return (min if self.is_loss else max)(finite, key=lambda rate: finite[rate])


SFT_RATES = dict.fromkeys(("adam", "muon"), (3e-4, 1e-3, 3e-3, 1e-2))
GSM8K_KEYS = tuple(
    f"data.{part}={{data_path: GSM8K/{file}.jsonl, input_key: question, output_key: answer}}"
    for part, file in (("train", "train"), ("validation", "test"))
)
TASKS = {
    "sft": Task(
        "SFT, bundled arithmetic", "examples/run_sft.py", "sft", SFT_RATES,
        "validation/val_loss", True, ("sft.val_period=20", "sft.val_num_answers=0"),
    ),
    "gsm8k": Task(
        "SFT, GSM8K", "examples/run_sft.py", "sft",
        dict.fromkeys(("adam", "muon"), (1e-3, 3e-3, 1e-2)), "validation/val_loss", True,
        (
            *GSM8K_KEYS,
            "sft.max_num_steps=120", "sft.val_period=20", "sft.val_num_answers=0",
        ),
    ),
    "grpo": Task(
        "GRPO, bundled arithmetic", "examples/run_grpo_math.py", "grpo",
        dict.fromkeys(("adam", "muon"), (3e-5, 1e-4, 3e-4, 1e-3)), "validation/accuracy", False,
        ("policy.generation.backend=hf", "grpo.val_period=5"),
    ),
}  # fmt: skip


def command(task: Task, optimizer: str, lr: float, seed: int, folder: Path) -> list[str]:
    """The command of one run, as it can be typed after `uv run`."""
    return [
        task.script,
        f"policy.optimizer.optimizer={optimizer}",
        f"policy.optimizer.lr={lr:g}",
        f"{task.algorithm}.seed={seed}",
        *task.overrides,
        "cluster.launcher=local",
        f"checkpointing.checkpoint_dir={folder / 'checkpoints'}",
        f"logger.log_dir={folder / 'logs'}",
    ]


def run(name: str, optimizer: str, lr: float, seed: int, *, gsm8k: str) -> None:
    """Train once and keep the curves; nothing is kept of a run that failed."""
    task, kept = TASKS[name], raw_file(name, optimizer, lr, seed)
    with tempfile.TemporaryDirectory() as scratch:
        argv = command(task, optimizer, lr, seed, Path(scratch))
        typed = [word.replace("GSM8K", gsm8k) for word in argv]
        ended = subprocess.run(
            [sys.executable, *typed],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if ended.returncode:
            raise SystemExit(
                f"{shlex.join(typed)} ended with {ended.returncode}:\n{ended.stdout[-2000:]}"
                f"\n{ended.stderr[-2000:]}"
            )
        (log,) = Path(scratch, "logs").glob("exp_*")
        curves = curves_of(list(read_lines(log / "metrics.jsonl")), task.metric)
    kept.parent.mkdir(parents=True, exist_ok=True)
    shown = shlex.join(word.replace(scratch, "RUN") for word in argv)
    record = {"task": name, "optimizer": optimizer, "lr": lr, "seed": seed, "command": shown}
    kept.write_text(json.dumps(record | curves) + "\n")
    print(f"{kept.stem}: {task.metric} {curves[task.metric][-1]:.4g}", flush=True)


def raw_file(name: str, optimizer: str, lr: float, seed: int) -> Path:
    """Where the curves of a run are kept."""
    return RAW / f"{name}-{optimizer}-{lr:g}-{seed}.json"


def curves_of(records: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The metric where it was measured, with the seconds of training until then.

    Validation and saves are in no second; the training loss or reward is a mean of some steps.
    """
    seconds, kept = 0.0, {"step": [], "seconds": [], metric: []}
    trained: list[float] = []
    for record in records:
        seconds += record.get("performance/step_s", 0.0)
        value = record.get("train/reward", record.get("train/loss"))
        trained += [] if value is None else [value]
        if metric in record:
            kept["step"].append(record["step"])
            kept["seconds"].append(round(seconds, 3))
            kept[metric].append(round(record[metric], 6))
    means = [
        round(statistics.fmean(trained[begin : begin + WINDOW]), 6)
        for begin in range(0, len(trained), WINDOW)
    ]
    return kept | {"train": means}


@dataclass(frozen=True)
class Runs:
    """All runs of one task with one optimizer, by rate."""

    task: Task
    optimizer: str
    by_rate: dict[float, list[dict[str, Any]]]

    @property
    def final(self) -> dict[float, list[float]]:
        """The metric at the end, of each seed."""
        return {lr: [r[self.task.metric][-1] for r in runs] for lr, runs in self.by_rate.items()}

    @property
    def best_rate(self) -> float:
        """The rate whose mean over the seeds is best."""
        return self.task.best({lr: statistics.fmean(found) for lr, found in self.final.items()})

    def curve(self, over: str) -> tuple[list[float], list[float]]:
        """At the best rate, means over the seeds."""
        runs = self.by_rate[self.best_rate]
        x, y = (
            [statistics.fmean(values) for values in zip(*(run[key] for run in runs), strict=True)]
            for key in (over, self.task.metric)
        )
        return x, y


def read_runs(name: str) -> list[Runs]:
    """What was kept of a task, one for each optimizer."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for file in sorted(RAW.glob(f"{name}-*.json")):
        record = json.loads(file.read_text())
        found.setdefault(record["optimizer"], {}).setdefault(record["lr"], []).append(record)
    return [Runs(TASKS[name], optimizer, dict(sorted(r.items()))) for optimizer, r in found.items()]


def table(name: str) -> str:
    """Every rate of both optimizers: mean and range of the seeds; the best of each is bold."""
    rows = [
        "| optimizer | lr | final, mean of 3 seeds | least to greatest | seconds |",
        "|---|---|---|---|---|",
    ]
    for runs in read_runs(name):
        for lr, final in runs.final.items():
            mean = f"{statistics.fmean(final):.4g}"
            seconds = statistics.median(run["seconds"][-1] for run in runs.by_rate[lr])
            shown = f"**{mean}**" if lr == runs.best_rate else mean
            between = f"{min(final):.4g} to {max(final):.4g}"
            rows.append(f"| {runs.optimizer} | {lr:g} | {shown} | {between} | {seconds:.1f} |")
    return "\n".join(rows)


def race(name: str) -> str:
    """When each optimizer at its best rate first was as good as the other in the end."""
    one, other = read_runs(name)
    said = []
    for runs, rival in ((one, other), (other, one)):
        goal = rival.curve("step")[1][-1]
        there = "never"
        for step, second, value in _points(runs):
            if value <= goal if runs.task.is_loss else value >= goal:
                there = f"at step {step:g}, after {second:.1f} s"
                break
        said.append(f"{runs.optimizer} reaches the final mean of {rival.optimizer} {there}")
    return "; ".join(said) + "."


def _points(runs: Runs) -> Iterator[tuple[float, float, float]]:
    steps, values = runs.curve("step")
    seconds, _ = runs.curve("seconds")
    return zip(steps, seconds, values, strict=True)


def draw(name: str, target: Path) -> None:
    """Final values against the rate, and the best curves against steps and against seconds."""
    metric = TASKS[name].metric.rpartition("/")[2]
    found = read_runs(name)
    finals: Series = {
        runs.optimizer: {math.log10(lr): statistics.fmean(f) for lr, f in runs.final.items()}
        for runs in found
    }
    charts = [Chart(f"{metric} in the end", finals, across="log10 of the learning rate")]
    for over, across in (("step", "step"), ("seconds", "seconds of training")):
        lines: Series = {
            runs.optimizer: dict(zip(*runs.curve(over), strict=True)) for runs in found
        }
        charts.append(Chart(f"{metric}, at the best rate of each", lines, across=across))
    save_picture(charts, target)


def write_report() -> None:
    """Draw the pictures, and put the tables into their places in the page."""
    page = PAGE.read_text()
    for name in TASKS:
        if len(read_runs(name)) == len(TASKS[name].rates):
            draw(name, RAW.with_name(f"adamw_vs_muon_{name}.svg"))
            page = with_results(page, name)
    PAGE.write_text(page)


def with_results(page: str, name: str) -> str:
    """The page with this task's table and race between its two comments."""
    pattern = rf"(<!-- results {name} -->\n).*?(<!-- end -->)"
    results = f"{table(name)}\n\n{race(name)}\n"
    return re.sub(pattern, lambda match: match[1] + results + match[2], page, flags=re.S)


def main() -> None:
    """Run what is missing of the tasks, then write the report."""
    parser = argparse.ArgumentParser(description="Compare AdamW and Muon.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="run what is missing")
    running.add_argument("tasks", nargs="+", choices=TASKS)
    running.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    running.add_argument("--gsm8k", default="gsm8k", help="folder of train.jsonl and test.jsonl")
    verbs.add_parser("report", help="write tables and pictures of what was run")
    args = parser.parse_args()
    if args.verb == "run":
        missing = [
            (name, optimizer, lr, seed)
            for seed, name in product(SEEDS, args.tasks)
            for optimizer, rates in TASKS[name].rates.items()
            for lr in rates
            if not raw_file(name, optimizer, lr, seed).exists()
        ]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda one: run(*one, gsm8k=str(Path(args.gsm8k).resolve())), missing))
    write_report()


if __name__ == "__main__":
    main()
