"""Which checkpoints survive."""

from __future__ import annotations

import math
from collections.abc import Mapping


def survivors(
    metric_of_step: Mapping[int, float | None], *, keep_top_k: int | None, higher_is_better: bool
) -> set[int]:
    """The steps to keep: the latest always, and the `keep_top_k` best (null keeps all).

    Of equal metrics the newer is better; a missing or NaN metric ranks below every number. With no
    metrics at all the newest are therefore the best.
    """
    if keep_top_k is None or not metric_of_step:
        return set(metric_of_step)

    def rank(step: int) -> tuple[bool, float, int]:
        metric = metric_of_step[step]
        if metric is None or math.isnan(metric):
            return (False, 0.0, step)
        return (True, metric if higher_is_better else -metric, step)

    best_first = sorted(metric_of_step, key=rank, reverse=True)
    return {max(metric_of_step), *best_first[:keep_top_k]}
