"""What the policy block derives: one backend, its optimizer, its schedule, its row lengths."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.optimizer import NEWTON_SCHULZ_STEPS, OptimizerConfig, SchedulerConfig
from nemo_like.config.policy import DTensorConfig, PolicyConfig


def on_megatron(megatron: dict, **policy) -> PolicyConfig:
    blocks = {"megatron_cfg": {"enabled": True, **megatron}, "dtensor_cfg": {"enabled": False}}
    return PolicyConfig.model_validate(policy | blocks)


def test_the_backend_is_the_one_that_is_enabled():
    assert isinstance(PolicyConfig().backend, DTensorConfig)
    assert isinstance(on_megatron({}).backend, MegatronConfig)


def test_megatron_overrides_the_optimizer_and_schedule_field_by_field():
    policy = on_megatron(
        {"optimizer": {"muon_momentum": 0.9, "lr": 0.0}, "scheduler": {"lr_warmup_iters": 3}},
        optimizer={"optimizer": "muon", "lr": 1e-3, "weight_decay": 0.2},
        scheduler={"lr_decay_style": "cosine"},
    )
    merged = policy.active_optimizer
    assert (merged.optimizer, merged.lr, merged.muon_momentum) == ("muon", 0.0, 0.9)
    assert merged.weight_decay == 0.2
    assert policy.active_scheduler.lr_warmup_iters == 3
    assert policy.active_scheduler.lr_decay_style == "cosine"


def test_an_idle_backend_overrides_nothing():
    policy = PolicyConfig.model_validate({"megatron_cfg": {"optimizer": {"lr": 1.0}}})
    assert policy.active_optimizer == policy.optimizer


def test_every_field_of_the_optimizer_can_be_overridden_and_is_inherited_by_default():
    own = MegatronConfig().optimizer
    names = OptimizerConfig.model_fields
    assert [getattr(own, name) for name in names] == [None] * len(names)
    with pytest.raises(ValidationError, match="greater than 0"):
        on_megatron({"optimizer": {"adam_eps": 0}})


@pytest.mark.parametrize(
    ("clip_grad", "max_grad_norm", "active"),
    [(None, 1.0, 1.0), (0, 1.0, None), (0.5, 1.0, 0.5), (None, None, None), (2, None, 2.0)],
)
def test_megatrons_clip_grad_overrides_the_norm_and_zero_does_not_clip(
    clip_grad, max_grad_norm, active
):
    policy = on_megatron({"optimizer": {"clip_grad": clip_grad}}, max_grad_norm=max_grad_norm)
    assert policy.active_max_grad_norm == active


@pytest.mark.parametrize(
    ("tp", "cp", "sequence_parallel", "divisor"),
    [(1, 1, False, 1), (8, 1, False, 1), (8, 1, True, 8), (1, 4, False, 8), (4, 2, True, 8)]
    + [(3, 2, True, 12)],
)
def test_row_lengths_follow_from_the_active_layout(tp, cp, sequence_parallel, divisor):
    layout = {
        "tensor_model_parallel_size": tp,
        "context_parallel_size": cp,
        "sequence_parallel": sequence_parallel,
    }
    assert on_megatron(layout).sequence_divisor == divisor
    multiple = on_megatron(layout, make_sequence_length_divisible_by=3 * divisor)
    assert multiple.sequence_divisor == 3 * divisor


@pytest.mark.parametrize("schedule", NEWTON_SCHULZ_STEPS)
def test_a_schedule_takes_the_steps_it_was_made_for_and_no_others(schedule):
    allowed = NEWTON_SCHULZ_STEPS[schedule]
    for steps in (4, 5, 6, 10):
        settings = {"muon_coefficient_type": schedule, "muon_num_ns_steps": steps}
        if schedule == "custom":
            settings["muon_ns_coefficients"] = [(1.5, -0.5, 0.0)] * steps
        if steps in allowed:
            OptimizerConfig.model_validate(settings)
        else:
            with pytest.raises(ValidationError, match="muon_num_ns_steps"):
                OptimizerConfig.model_validate(settings)


def test_a_node_that_is_built_directly_refuses_conflicts_too():
    with pytest.raises(ValidationError, match="exactly one backend"):
        PolicyConfig.model_validate({"megatron_cfg": {"enabled": True}})


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        ({}, 0),
        ({"lr_warmup_iters": 7}, 7),
        ({"lr_warmup_fraction": 0.25}, 10),
        ({"lr_warmup_fraction": 0.25, "lr_decay_iters": 80}, 20),
        ({"lr_warmup_fraction": 0.01}, 0.4),
    ],
)
def test_a_warm_up_is_so_many_steps_or_a_share_of_the_schedule(written, steps):
    assert SchedulerConfig.model_validate(written).warmup_steps(40) == steps


def test_without_a_decay_a_floor_above_the_learning_rate_is_no_conflict():
    policy = PolicyConfig.model_validate({"optimizer": {"lr": 1e-3, "min_lr": 1e-2}})
    assert policy.scheduler.lr_decay_style == "constant"


def test_numbers_in_the_environment_become_text():
    env_vars = {"NCCL_IB_DISABLE": 1, "RATIO": 0.5, "NAME": "a"}
    read = DTensorConfig.model_validate_json(json.dumps({"env_vars": env_vars}), strict=True)
    assert read.env_vars == {"NCCL_IB_DISABLE": "1", "RATIO": "0.5", "NAME": "a"}


def test_megatrons_warm_up_replaces_the_other_spelling_of_it_too():
    policy = on_megatron(
        {"scheduler": {"lr_warmup_iters": 5}}, scheduler={"lr_warmup_fraction": 0.5}
    )
    assert policy.active_scheduler.warmup_steps(40) == 5
