"""Metrics of ranks, micro-batches and rollouts, combined the way each metric says itself."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nemo_like.types import Metric, Metrics


def reduce(parts: Iterable[Metrics]) -> Metrics:
    """One metric per name: what its parts give together, by the reduction they carry.

    A mean is weighted and keeps the sum of the weights, so reducing in stages (micro-batches, then
    ranks) gives the same as reducing at once. A part of weight 0 says nothing, whatever its value
    is: that is an idle rank's NaN. Any other NaN is passed on by every reduction, because a metric
    that hides one is wrong.

    Raises:
        ValueError: a name comes with two reductions.
    """
    values_by_name: dict[str, list[Metric]] = {}
    for part in parts:
        for name, metric in part.items():
            values_by_name.setdefault(name, []).append(metric)
    return {name: _combine(name, values) for name, values in values_by_name.items()}


def flatten(metrics: Metrics, prefix: str = "") -> dict[str, float]:
    """The plain values, under names that begin with `prefix`, such as `train/`."""
    return {prefix + name: metric.value for name, metric in metrics.items()}


def _combine(name: str, metrics: list[Metric]) -> Metric:
    reductions = sorted({m.reduction for m in metrics})
    if len(reductions) > 1:
        raise ValueError(
            f"metric {name!r} was reported with the reductions {' and '.join(reductions)}; "
            "one name has one reduction: correct one of them, or give it a name of its own"
        )
    weight = math.fsum(m.weight for m in metrics)
    return Metric(_reduced_value(metrics, weight), metrics[0].reduction, weight)


def _reduced_value(metrics: list[Metric], weight: float) -> float:
    values = [m.value for m in metrics]
    match metrics[0].reduction:
        case "last":
            return values[-1]
        case "mean" if weight == 0:
            return math.nan
        case "mean":
            # Dividing each weight first keeps a mean of huge values from overflowing.
            return _sum(m.value * (m.weight / weight) for m in metrics if m.weight != 0)
        case "sum":
            return _sum(values)
        case "min":
            return math.nan if any(map(math.isnan, values)) else min(values)
        case "max":
            return math.nan if any(map(math.isnan, values)) else max(values)


def _sum(values: Iterable[float]) -> float:
    values = list(values)
    # `fsum` gives the same for every order, but refuses infinities of both signs.
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
