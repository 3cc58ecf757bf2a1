from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemo_like.config.optimizer import OptimizerConfig, SchedulerConfig
from nemo_like.errors import ConfigError
from nemo_like.optim.schedule import Schedule

TOTAL = 40
OPTIMIZER = {"lr": 3e-4, "min_lr": 2e-5, "weight_decay": 0.1}
DECAYS = [
    {"lr_decay_style": "constant"},
    {"lr_decay_style": "linear"},
    {"lr_decay_style": "cosine"},
    {"lr_decay_style": "cosine", "lr_decay_iters": 25},
    {"lr_decay_style": "inverse-square-root"},
    *[
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 13, "lr_wsd_decay_style": style}
        for style in ("exponential", "linear", "cosine", "minus_sqrt")
    ],
]
WARMUPS = [
    {},
    {"lr_warmup_iters": 6},
    {"lr_warmup_iters": 6, "lr_warmup_init": 1e-5},
    {"lr_warmup_fraction": 0.11},
]
WEIGHT_DECAYS = [
    {},
    {"start_weight_decay": 0.0, "weight_decay_incr_style": "linear"},
    {"start_weight_decay": 0.02, "end_weight_decay": 0.3, "weight_decay_incr_style": "cosine"},
]


def schedule(total: int = TOTAL, **settings) -> Schedule:
    return Schedule(OptimizerConfig(**OPTIMIZER), SchedulerConfig(**settings), total)


def megatron(**settings):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config = SchedulerConfig(**settings)
    peak = OPTIMIZER["weight_decay"]
    start, end = config.start_weight_decay, config.end_weight_decay
    return OptimizerParamScheduler(
        SimpleNamespace(param_groups=[{}]),
        init_lr=config.lr_warmup_init,
        max_lr=OPTIMIZER["lr"],
        min_lr=OPTIMIZER["min_lr"],
        lr_warmup_steps=config.warmup_steps(TOTAL),
        lr_decay_steps=config.lr_decay_iters or TOTAL,
        lr_decay_style=config.lr_decay_style,
        start_wd=peak if start is None else start,
        end_wd=peak if end is None else end,
        wd_incr_steps=TOTAL,
        wd_incr_style=config.weight_decay_incr_style,
        wsd_decay_steps=config.lr_wsd_decay_iters,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )


@pytest.mark.parametrize("weight_decay", WEIGHT_DECAYS)
@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("decay", DECAYS)
def test_every_value_is_the_one_of_megatron(decay, warmup, weight_decay):
    settings = decay | warmup | weight_decay
    ours, theirs = schedule(**settings), megatron(**settings)
    for step in range(TOTAL + 5):
        group = theirs.optimizer.param_groups[0]
        assert ours.lr(step) == pytest.approx(group["lr"], rel=1e-12, abs=1e-18)
        assert ours.weight_decay(step) == pytest.approx(group["weight_decay"], rel=1e-12)
        theirs.step(1)


def test_every_group_gets_the_values_of_the_step():
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}, {"lr": 2.0}])
    ours = schedule(lr_warmup_iters=10)
    ours.apply(optimizer, 5)
    assert optimizer.param_groups == [{"lr": 1.5e-4, "weight_decay": 0.1}] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_warmup_iters": TOTAL + 1}, r"lr_warmup_iters .* \(41 steps\) must end before"),
        ({"lr_decay_style": "linear", "lr_warmup_iters": TOTAL}, r"lr_warmup_iters .* \(40 steps"),
        (
            {"lr_decay_style": "linear", "lr_warmup_fraction": 1.0},
            r"lr_warmup_fraction .*; the run",
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 38, "lr_warmup_iters": 6},
            r"lr_wsd_decay_iters .*warm-up \(6 steps\) and last part \(38\)",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        schedule(**settings)


def test_without_a_decay_a_floor_above_the_peak_means_nothing():
    constant = Schedule(OptimizerConfig(lr=0.01, min_lr=0.1), SchedulerConfig(), TOTAL)
    assert constant.lr(TOTAL + 1) == 0.01
