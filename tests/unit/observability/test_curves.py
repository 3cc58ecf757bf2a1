import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_like.observability.curves import charts_of, smoothed, thinned
from nemo_like.observability.headlines import headlines

SERIES = {
    "train/loss": {1: 2.0, 2: 1.0},
    "validation/val_loss": {0: 3.0, 2: 1.5},
    "validation/accuracy": {0: 0.0, 2: 0.5},
    "train/muon/update_rms": {1: 0.1, 2: 0.1},
    "train/adamw/update_rms": {1: 0.2, 2: 0.2},
    "train/weight_decay": {1: 0.1, 2: 0.1},
    "timing/train": {1: 3.0, 2: 3.0},
    "timing/train/forward": {1: 6.0, 2: 5.0},
    "timing/validation": {2: 2.0},
    "timing/other": {1: 0.5, 2: 0.5},
    "timing/data": {1: 0.001, 2: 0.001},
    "performance/wall_s": {1: 9.501, 2: 10.501},
    "performance/tokens_per_s": {1: 1000.0, 2: 3000.0},
    "performance/eta_s": {1: 1.0, 2: 0.0},
}


def test_headlines_say_where_a_run_ended_and_where_it_began():
    assert headlines(SERIES) == {
        "loss": "1.0000 (from 2.0000)",
        "held-out loss": "1.5000 (from 3.0000)",
        "held-out accuracy": "50.0% (from 0.0%)",
        "tokens/s": "2,000",
        "steps": "2",
    }
    assert headlines({}) == {}


def test_charts_name_their_lines():
    lines = {c.title: set(c.lines) for c in charts_of(SERIES)}
    assert lines["Loss"] == {"training", "held out"}
    assert lines["Size of an update (RMS)"] == {"muon", "adamw"}


def test_what_is_told_of_muon_now_and_then_is_drawn_together_by_kind_of_matrix():
    kinds = ("q_proj", "experts.up_proj")
    measures = ("update_rms", "update_to_weight", "effective_rank", "orthogonality_error")
    now_and_then = {1: 0.3, 11: 0.2}
    series = SERIES | {f"train/muon/{k}/{m}": now_and_then for k in kinds for m in measures}
    series |= {f"train/muon/{m}_ms": now_and_then for m in ("newton_schulz", "exchange_wait")}
    series |= {f"train/muon/bucket{i}/{m}": now_and_then for i in range(2) for m in ("ms", "mb")}
    charts = [c for c in charts_of(series) if c.title.startswith("Muon")]
    assert [set(c.lines) for c in charts] == [
        *[set(kinds)] * len(measures),
        {"newton_schulz", "exchange_wait"},
        {"bucket0", "bucket1"},
    ]
    assert all(points == now_and_then for c in charts for points in c.lines.values())
    assert {c.title: c for c in charts_of(SERIES)}.items() <= {
        c.title: c for c in charts_of(series)
    }.items()


def test_the_phases_of_the_chart_add_up_to_the_wall_time():
    chart = charts_of(SERIES)[-1]
    assert chart.is_stacked
    assert set(chart.lines) == {"train/forward", "train", "validation", "other"}  # data is tiny
    for step, wall_s in SERIES["performance/wall_s"].items():
        assert sum(line[step] for line in chart.lines.values()) == pytest.approx(wall_s)


def test_a_long_run_keeps_its_mean_time_per_step():
    series = {
        "timing/train": {step: float(step % 7) for step in range(1, 2501)},
        "performance/wall_s": {step: float(step % 7) for step in range(1, 2501)},
    }
    (chart,) = (c for c in charts_of(series) if c.is_stacked)
    means = list(chart.lines["train"].values())
    assert len(means) == 100
    assert sum(means) / 100 == pytest.approx(sum(series["timing/train"].values()) / 2500)


@given(st.integers(1, 20_000), st.randoms(use_true_random=False))
def test_thinning_keeps_the_ends_and_the_extremes(count, random):
    points = {step: random.random() for step in range(count)}
    thin = thinned(points)
    assert len(thin) <= 802
    assert thin.items() <= points.items()
    assert list(thin) == sorted(thin)
    assert {0, count - 1} <= thin.keys()
    assert max(thin.values()) == max(points.values())
    assert min(thin.values()) == min(points.values())


def test_smoothing_does_not_lag_and_leaves_gaps():
    line = {step: 3.0 * step for step in range(50)}
    assert smoothed(line, span=9) == pytest.approx(line)
    gap = line | {25: math.nan}
    assert math.isnan(smoothed(gap, span=9)[25])
    assert math.isfinite(smoothed(gap, span=9)[24])
