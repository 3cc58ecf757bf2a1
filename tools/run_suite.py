r"""Run a list of recipes, all of them, and write one table of what came of it.

    uv run tools/run_suite.py tests/test_suites/nightly.txt
    uv run tools/run_suite.py tests/test_suites/nightly.txt --only muon --update-baseline
    uv run tools/run_suite.py tests/test_suites/release.txt cluster.address=auto

`table.json` and `table.html` are written anew after every run, so a list that is ended early has
told all that it knew. Exit code 1: a run failed, broke a limit, or drifted from the baseline.
2: the list can not be read, or nothing of it is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_like.errors import ConfigError
from nemo_like.observability.run_folder import read_lines
from tools.suites import ROOT, SUITES, Line, command, read_suite

SHOWN = (
    "train/loss",
    "train/grad_norm",
    "validation/val_loss",
    "train/reward",
    "validation/accuracy",
    "train/token_mult_prob_error",
    "train/max_memory_gb",
    "performance/tokens_per_s",
)
"""Final metrics of the table; of the speed the median."""
DETERMINISTIC = {"sft": ("train/loss", "train/grad_norm", "validation/val_loss")}
"""Metrics of a tiny form that only a change of the code changes, by algorithm. Where an engine
samples, one token that falls otherwise makes another run: limits judge those."""
MOST_DRIFT = 0.03
"""A deterministic metric may be this share of its baseline away from it."""


@dataclass
class Result:
    """What came of one line."""

    name: str
    command: str
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory_gb: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    change: dict[str, float] = field(default_factory=dict)
    """Relative to the baseline: of metrics, `seconds` and `memory_gb`."""


def run_line(
    line: Line, folder: Path, *, more: tuple[str, ...], baseline: dict[str, float]
) -> Result:
    """What came of a line, run in a folder of its own."""
    folder.mkdir(parents=True)
    argv = command(line, folder, more=more)
    result = Result(line.name, " ".join(["uv", "run", *argv[1:]]))
    began = time.monotonic()
    with (folder / "output.txt").open("wb") as output:
        code, result.memory_gb = _watched(argv, output.fileno(), line.minutes * 60)
    result.seconds = round(time.monotonic() - began, 1)
    if code is None:
        result.failures.append(f"took longer than {line.minutes:g} minutes and was ended")
    elif code:
        result.failures.append(f"exit code {code}; see {folder / 'output.txt'}")
    result.metrics = final_metrics(folder / "logs")
    judge(result, line, baseline)
    return result


def _watched(argv: list[str], output: int, limit_s: float) -> tuple[int | None, float]:
    """Exit code (None: ended by us), and the most gigabytes that all its processes had at once."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = psutil.Popen(
        argv, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    deadline, most = time.monotonic() + limit_s, 0.0
    while process.poll() is None:
        family = _family(process)
        most = max(most, sum(_resident(one) for one in family) / 1e9)
        if time.monotonic() > deadline:
            _end(process, family)
            return None, round(most, 2)
        time.sleep(1.0)
    return process.returncode, round(most, 2)


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _end(process: psutil.Process, family: list[psutil.Process]) -> None:
    """An orderly end first; what is left of the family after half a minute is killed."""
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=30)
    for one in left:
        one.kill()  # psutil looks that it is still the same process
    psutil.wait_procs(left, timeout=10)


def final_metrics(logs: Path) -> dict[str, float]:
    """The last value of every metric in the one log folder here, and the median of its speed."""
    records = [record for file in logs.glob("exp_*/metrics.jsonl") for record in read_lines(file)]
    found = {name: value for record in records for name, value in record.items()}
    speeds = [r["performance/tokens_per_s"] for r in records if "performance/tokens_per_s" in r]
    if speeds:
        found["performance/tokens_per_s"] = statistics.median(speeds)
    return found


def judge(result: Result, line: Line, baseline: dict[str, float]) -> None:
    """Book what is out of its limits, and what has changed since the baseline."""
    result.failures += [text for limit in line.limits if (text := limit.failure(result.metrics))]
    now = measured(result)
    result.change = {
        name: now[name] / before - 1 for name, before in baseline.items() if name in now and before
    }
    steady = DETERMINISTIC.get(line.recipe.partition("-")[0], ()) if line.form == "tiny" else ()
    for name in steady:
        if name in baseline and not abs(result.change.get(name, float("nan"))) <= MOST_DRIFT:
            result.failures.append(
                f"{name} {now.get(name)}, {baseline[name]:g} in the baseline: more than "
                f"{MOST_DRIFT:.0%} away; if that is meant, run with --update-baseline"
            )


def measured(result: Result) -> dict[str, float]:
    """What a baseline keeps of a result."""
    shown = {name: result.metrics[name] for name in SHOWN if name in result.metrics}
    return shown | {"seconds": result.seconds, "memory_gb": result.memory_gb}


def write_table(results: list[Result], folder: Path) -> None:
    """`table.json` and `table.html` of what there is so far."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    records = [asdict(r) | {"metrics": measured(r)} for r in results]
    (folder / "table.json").write_text(json.dumps(records, indent=1) + "\n")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = ["seconds", "memory_gb"]
    columns += [name for name in SHOWN if any(name in r["metrics"] for r in records)]
    page = environment.get_template("suite_table.html.jinja").render(rows=records, columns=columns)
    (folder / "table.html").write_text(page)


def update_baseline(file: Path, results: list[Result]) -> None:
    """Put what was measured without failure into the file, beside what else is there."""
    baseline = read_baseline(file)
    baseline |= {r.name: measured(r) for r in results if not r.failures}
    file.write_text(json.dumps(dict(sorted(baseline.items())), indent=1) + "\n")


def read_baseline(file: Path) -> dict[str, dict[str, float]]:
    """What is expected of each line; nothing of those that never ran."""
    return json.loads(file.read_text()) if file.exists() else {}


def main() -> int:
    """Run the list that the command line names; the exit code."""
    parser = argparse.ArgumentParser(description="Run a list of recipes and write one table.")
    parser.add_argument("suite", type=Path, help="such as tests/test_suites/nightly.txt")
    parser.add_argument("overrides", nargs="*", help="key=value, of every run of the list")
    parser.add_argument("--only", default="", help="run the lines whose recipe holds this text")
    parser.add_argument("--baseline", type=Path, default=SUITES / "baseline.json")
    parser.add_argument("--update-baseline", action="store_true", help="keep what was measured")
    parser.add_argument("--folder", type=Path, help="default: a new one in results/suites")
    args = parser.parse_args()

    try:
        lines = [line for line in read_suite(args.suite) if args.only in line.recipe]
    except OSError as error:
        print(f"{args.suite}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
        return 2
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if not lines:
        print(f"{args.suite}: no recipe of the list holds {args.only!r}", file=sys.stderr)
        return 2
    now = time.strftime("%Y%m%d-%H%M%S")
    folder = args.folder or ROOT / f"results/suites/{args.suite.stem}-{now}"
    folder.mkdir(parents=True)
    # A change that is going to be the baseline is not judged by the old one.
    baseline = {} if args.update_baseline else read_baseline(args.baseline)
    results: list[Result] = []
    for number, line in enumerate(lines, start=1):
        print(f"[{number}/{len(lines)}] {line.name}", flush=True)
        own = folder / line.name.replace(" ", ".")
        expected = baseline.get(line.name, {})
        result = run_line(line, own, more=tuple(args.overrides), baseline=expected)
        results.append(result)
        said = "; ".join(result.failures) or "passed"
        print(f"    {said} ({result.seconds:.0f} s, {result.memory_gb:.1f} GB)", flush=True)
        write_table(results, folder)
    if args.update_baseline:
        update_baseline(args.baseline, results)
    failed = sum(bool(result.failures) for result in results)
    print(f"{len(results) - failed} of {len(lines)} passed: {folder / 'table.html'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
