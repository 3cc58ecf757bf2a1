"""The few metrics that people look at first: one table for the bar, the summary and the report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nemo_like.observability.curves import Points


@dataclass(frozen=True)
class Headline:
    """How a metric is called and written; `is_result` if it also says what a whole run came to.

    `better` is the way that it should go, where there is one.
    """

    metric: str
    label: str
    form: str
    is_result: bool = True
    better: Literal["lower", "higher"] | None = None


HEADLINES = (
    Headline("train/loss", "loss", "{:.4f}", better="lower"),
    Headline("validation/val_loss", "held-out loss", "{:.4f}", better="lower"),
    Headline("validation/accuracy", "held-out accuracy", "{:.1%}", better="higher"),
    Headline("train/reward", "reward", "{:.3f}", better="higher"),
    Headline("train/rollout_age_steps", "age", "{:.0f}", is_result=False),
    Headline("train/grad_norm", "grad norm", "{:.3g}", is_result=False),
    Headline("train/lr", "lr", "{:.2e}", is_result=False),
    Headline("performance/tokens_per_s", "tokens/s", "{:,.0f}", better="higher"),
    Headline("performance/mfu", "MFU", "{:.1%}", better="higher"),
)


def headlines(series: Mapping[str, Points]) -> dict[str, str]:
    """What a run came to: final values and where they began, and the median of its speed."""
    found = {}
    for headline in HEADLINES:
        values = list(series.get(headline.metric, {}).values())
        if not (headline.is_result and values):
            continue
        if headline.metric.startswith("performance/"):
            found[headline.label] = headline.form.format(statistics.median(values))
        else:
            began = f" (from {headline.form.format(values[0])})" if len(values) > 1 else ""
            found[headline.label] = headline.form.format(values[-1]) + began
    if steps := list(series.get("train/loss", {})):
        found["steps"] = f"{steps[-1]:,}"
    return found
