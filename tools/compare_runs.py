"""Lays the curves of several runs over each other, with what they came to and where they differ.

    uv run tools/compare_runs.py logs/exp_001 logs/exp_002
    uv run tools/compare_runs.py adamw=logs/exp_001 muon=logs/exp_002 --x seconds
    uv run tools/compare_runs.py logs/exp_* --metrics 'train/*loss*' 'validation/*' --out losses.svg

A run is its log folder; NAME=FOLDER names its line. The seconds are those of its steps, without the
start and without what lay between two parts of a run that was continued.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from nemo_like.config.draft import differing
from nemo_like.errors import ConfigError
from nemo_like.observability.console import RunConsole
from nemo_like.observability.curves import (
    CHARTS,
    NOISY,
    Chart,
    Points,
    Series,
    read_series,
    thinned,
)
from nemo_like.observability.headlines import HEADLINES
from nemo_like.observability.plots import COLOURS, draw, save_picture
from nemo_like.observability.records import Table
from nemo_like.observability.report import render
from nemo_like.observability.run_folder import RunFolder
from tools.command_line import Parser, run

ENDINGS = (".html", ".png", ".svg")
DEFAULT_FILES = (Path("comparison.html"), Path("comparison.png"))
WALL_TIME = "performance/wall_s"


@dataclass(frozen=True)
class Run:
    """What a run left behind; `config` is empty where it did not say how it was set."""

    folder: Path
    series: Series
    config: dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a log folder, or NAME=FOLDER")
    parser.add_argument(
        "--metrics", nargs="+", metavar="GLOB", help="which, such as 'train/muon/*/update_rms'"
    )
    parser.add_argument("--x", choices=("step", "seconds"), default="step")
    parser.add_argument(
        "--out",
        type=Path,
        nargs="+",
        default=DEFAULT_FILES,
        metavar="FILE",
        help=f"what to write, by its ending ({', '.join(ENDINGS)}); default: "
        f"{' and '.join(map(str, DEFAULT_FILES))}",
    )
    return run(parser, argv, _compare)


def _compare(options: argparse.Namespace) -> int:
    for file in options.out:
        if file.suffix not in ENDINGS:
            raise ConfigError(f"--out {file}: expected a name that ends in {', '.join(ENDINGS)}")
    runs = read_runs(options.runs)
    metrics = chosen_metrics(runs, options.metrics)
    if options.x == "seconds":
        _refuse_without_times(runs)
    charts = comparison_of({n: r.series for n, r in runs.items()}, metrics, across=options.x)
    settings = differing(*(each.config for each in runs.values() if each.config))
    with_config = [name for name, each in runs.items() if each.config]
    for table in _tables(runs, metrics, with_config, settings):
        RunConsole().table(table)
    for file in options.out:
        if file.suffix == ".html":
            page = render(
                "comparison.html.jinja",
                beside=Path(__file__).parent,
                names={name: str(each.folder) for name, each in runs.items()},
                colours=[COLOURS[i % len(COLOURS)] for i in range(len(runs))],
                metrics=metrics,
                outcomes={name: _outcomes(each, metrics) for name, each in runs.items()},
                charts=[draw(chart) for chart in charts],
                with_config=with_config,
                settings=settings,
            )
            file.write_text(page, encoding="utf-8")
        else:
            save_picture(charts, file)
        print(f"wrote {file}")
    return 0


def read_runs(words: Sequence[str]) -> dict[str, Run]:
    """The runs by name; without one, by as much of the folder's path as tells them apart."""
    named: list[tuple[str | None, Path]] = []
    for word in words:
        name, has_name, place = word.rpartition("=")
        if has_name and not Path(word).exists():
            named.append((name, Path(place)))
        else:
            named.append((None, Path(word)))
    folders = [path.resolve() for _, path in named]
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(set(folders)):
        depth += 1
    runs: dict[str, Run] = {}
    for (given, path), folder in zip(named, folders, strict=True):
        name = given or "/".join(folder.parts[-depth:])
        if name in runs:
            raise ConfigError(f"two runs are called {name}: name them apart, as NAME={path}")
        runs[name] = _read(path)
    return runs


def _read(path: Path) -> Run:
    folder = RunFolder.of_run(path)
    return Run(path, read_series(folder.metrics), folder.read_config())


def chosen_metrics(runs: dict[str, Run], globs: Sequence[str] | None) -> list[str]:
    """The metrics that the globs ask for, in their order; without globs, those looked at first."""
    there = sorted({name for each in runs.values() for name in each.series})
    wanted = globs or [headline.metric for headline in HEADLINES]
    found = list(dict.fromkeys(n for glob in wanted for n in there if fnmatchcase(n, glob)))
    for glob in globs or ():
        if not any(fnmatchcase(name, glob) for name in there):
            raise ConfigError(f"--metrics {glob}: no run has it; there are {', '.join(there)}")
    if not found:
        raise ConfigError(f"no run has finished a step yet; there are {there or 'no metrics'}")
    return found


def _refuse_without_times(runs: dict[str, Run]) -> None:
    for each in runs.values():
        if WALL_TIME not in each.series:
            raise ConfigError(f"--x seconds: {each.folder} does not say {WALL_TIME}; use --x step")


def comparison_of(
    runs: Mapping[str, Series], metrics: Iterable[str], *, across: Literal["step", "seconds"]
) -> list[Chart]:
    """A chart for each metric with a line for each run, which is empty where the run lacks it."""
    charts = []
    for metric in metrics:
        lines = {
            name: thinned(_points(series, metric, by_seconds=across == "seconds"))
            for name, series in runs.items()
        }
        known = [entry for entry in CHARTS if re.fullmatch(entry[2], metric)]
        title, unit, _ = known[0] if known else ("", "", "")
        charts.append(
            Chart(
                metric,
                lines,
                unit="" if unit == "%" else unit,
                across=across,
                is_share=unit == "%",
                is_noisy=title in NOISY,
            )
        )
    return charts


def _points(series: Series, metric: str, *, by_seconds: bool) -> Points:
    """The values at each step, or at the seconds that the steps up to it took together."""
    points = series.get(metric, {})
    if not by_seconds:
        return points
    took = series.get("performance/wall_s", {})
    clock = dict(zip(took, itertools.accumulate(took.values()), strict=True))
    return {clock.get(step, 0.0): value for step, value in points.items()}


def outcome(metric: str, points: Points) -> tuple[str, str]:
    """The final value of a metric, or the median of a speed; and the best, or how far it went."""
    named = [headline for headline in HEADLINES if headline.metric == metric]
    form = named[0].form if named else "{:.4g}"
    values = {step: value for step, value in points.items() if math.isfinite(value)}
    last = list(points.values())[-1]
    if not values:
        return form.format(last), ""
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if metric.startswith("performance/"):
        return form.format(statistics.median(values.values())), "median"
    if named and named[0].better:
        best = low if named[0].better == "lower" else high
        return form.format(last), f"best {form.format(values[best])} at step {best}"
    return form.format(last), f"{form.format(values[low])} to {form.format(values[high])}"


def _outcomes(each: Run, metrics: Sequence[str]) -> list[tuple[str, str]]:
    return [outcome(n, each.series[n]) if n in each.series else ("", "") for n in metrics]


def _tables(
    runs: dict[str, Run],
    metrics: Sequence[str],
    with_config: Sequence[str],
    settings: dict[str, tuple[str, ...]],
) -> list[Table]:
    """The same for a terminal, a column for each run."""
    outcomes = [_outcomes(each, metrics) for each in runs.values()]
    rows = [
        (metric, *(f"{final} ({best})" if best else final for final, best in of_runs))
        for metric, of_runs in zip(metrics, zip(*outcomes, strict=True), strict=True)
    ]
    tables = [Table("What they came to", ("metric", *runs), tuple(rows))]
    if settings:
        differences = tuple((key, *values) for key, values in settings.items())
        tables.append(Table("Where they were set differently", ("key", *with_config), differences))
    return tables


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
