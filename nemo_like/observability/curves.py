"""The curves in `metrics.jsonl`, and the charts of them that matter."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_like.observability.run_folder import read_lines

Points = dict[float, float]
"""The value of a metric at each step (or second), in their order."""
Series = dict[str, Points]

_MOST_POINTS = 800
_MOST_BARS = 100
NOISY = ("Loss", "Reward", "Gradient norm", "Tokens per second", "Model FLOPs utilisation")


@dataclass(frozen=True)
class Chart:
    """Lines under one title; parts of a whole are stacked, shares are shown in per cent."""

    title: str
    lines: Series
    unit: str = ""
    across: str = "step"
    is_stacked: bool = False
    is_share: bool = False
    is_noisy: bool = False


CHARTS: tuple[tuple[str, str, str], ...] = (
    # title, unit, pattern of the metrics; its group, if it has one, names the line
    ("Loss", "nats per token", r"train/loss|validation/val_loss"),
    ("Accuracy on held-out problems", "%", r"validation/accuracy"),
    ("Reward", "", r"(?:train|validation)/reward"),
    ("Groups whose rewards differ", "%", r"train/mixed_groups"),
    ("Tokens of an answer", "", r"train/(mean|max)_gen_tokens_per_sample"),
    ("Entropy", "nats per token", r"train/approx_entropy"),
    ("Engine against policy, factor per token", "", r"train/((?:token|probe)_mult_prob_error\w*)"),
    ("Age of the rollouts trained on", "steps", r"train/rollout_age_steps"),
    ("Drawing beside training", "seconds", r"performance/rollout_hidden_s"),
    ("Learning rate", "", r"train/lr"),
    ("Gradient norm", "", r"train/grad_norm"),
    ("Size of an update (RMS)", "", r"train/([^/]+)/update_rms"),
    ("Tokens per second", "", r"performance/tokens_per_s"),
    ("Model FLOPs utilisation", "%", r"performance/mfu"),
    ("Muon: size of an update, by kind of matrix (RMS)", "", r"train/muon/(.+)/update_rms"),
    ("Muon: update to weight", "", r"train/muon/(.+)/update_to_weight"),
    ("Muon: effective rank of what is orthogonalised", "%", r"train/muon/(.+)/effective_rank"),
    ("Muon: orthogonality error", "", r"train/muon/(.+)/orthogonality_error"),
    ("Muon: time in the exchange", "ms", r"train/muon/(newton_schulz|exchange_wait)_ms"),
    ("Muon: time of a bucket", "ms", r"train/muon/(bucket\d+)/ms"),
)
_LINE_NAMES = {
    "train/loss": "training",
    "validation/val_loss": "held out",
    "train/reward": "training",
    "validation/reward": "held out",
}


def read_series(path: Path) -> Series:
    """The curves of a `metrics.jsonl`: name -> step -> value; of a step told twice, the last."""
    series: Series = {}
    for record in read_lines(path):
        for name, value in record.items():
            if name not in ("step", "time"):
                series.setdefault(name, {})[record["step"]] = float(value)
    return {name: dict(sorted(points.items())) for name, points in series.items()}


def charts_of(series: Mapping[str, Points]) -> list[Chart]:
    """The charts of a report, as far as the run has their metrics."""
    charts = []
    for title, unit, pattern in CHARTS:
        lines = {}
        for name, points in sorted(series.items()):
            if match := re.fullmatch(pattern, name):
                label = match[1] if match.re.groups else _LINE_NAMES.get(name, name.split("/")[-1])
                lines[label] = thinned(points)
        if lines:
            shown_unit, is_share = ("", True) if unit == "%" else (unit, False)
            is_noisy = title in NOISY
            charts.append(Chart(title, lines, shown_unit, is_share=is_share, is_noisy=is_noisy))
    return charts + _phases(series)


def thinned(points: Points) -> Points:
    """At most 800 points that look the same: the lowest and the highest of each stretch."""
    if len(points) <= _MOST_POINTS:
        return points
    steps = list(points)
    size = math.ceil(2 * len(steps) / _MOST_POINTS)
    kept: set[float] = {steps[0], steps[-1]}
    for start in range(0, len(steps), size):
        stretch = [s for s in steps[start : start + size] if math.isfinite(points[s])]
        if stretch:
            kept |= {min(stretch, key=points.__getitem__), max(stretch, key=points.__getitem__)}
    return {step: points[step] for step in sorted(kept)}


def smoothed(points: Points, *, span: int) -> Points:
    """The mean of the `span` points around each one, fewer towards the ends; gaps stay gaps.

    It looks both ways, so a smoothed curve does not lag behind what it smooths.
    """
    values = list(points.values())
    result = {}
    for index, step in enumerate(points):
        reach = min(span // 2, index, len(values) - 1 - index)
        near = [v for v in values[index - reach : index + reach + 1] if math.isfinite(v)]
        result[step] = statistics.fmean(near) if math.isfinite(values[index]) else math.nan
    return result


def _phases(series: Mapping[str, Points]) -> list[Chart]:
    """The step-time chart: means over stretches of steps; phases under a hundredth are `other`."""
    phases = {k.removeprefix("timing/"): v for k, v in series.items() if k.startswith("timing/")}
    steps = list(series.get("performance/wall_s", {}))
    if not phases or not steps:
        return []
    size = math.ceil(len(steps) / _MOST_BARS)
    stretches = [steps[i : i + size] for i in range(0, len(steps), size)]
    total = sum(sum(points.values()) for points in phases.values())
    lines: Series = {}
    for name, points in sorted(phases.items(), key=lambda item: -sum(item[1].values())):
        kept = name if sum(points.values()) > total / 100 else "other"
        line = lines.setdefault(kept, dict.fromkeys((s[0] for s in stretches), 0.0))
        for stretch in stretches:
            line[stretch[0]] += sum(points.get(s, 0.0) for s in stretch) / len(stretch)
    return [Chart("Where the time of a step goes", lines, "seconds", is_stacked=True)]
