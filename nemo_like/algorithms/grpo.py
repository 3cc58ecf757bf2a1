"""GRPO: sample groups of answers, compare each with its group, and make the better ones likelier.

Source: Shao et al., DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.
"""

from __future__ import annotations

from collections.abc import Callable

from nemo_like.algorithms.policy_gradient import (
    advantages,
    prepared,
    scaled,
    told,
    update,
)
from nemo_like.config.grpo import GRPOConfig
from nemo_like.interfaces import Journal, Policy, RolloutSource
from nemo_like.losses.clipped_pg import ClippedPG
from nemo_like.rollout.collect import rewards_of, rollout_batch, rollout_metrics, truncated
from nemo_like.types import Metrics, StepStats

Validate = Callable[[int], Metrics]
"""Given the step, what a validation found."""
Check = Callable[[int, StepStats], None]
"""Given the step and what it did, raises or speaks up if engine and policy have drifted apart."""


def train(
    policy: Policy,
    rollouts: RolloutSource,
    validate: Validate,
    journal: Journal,
    check: Check,
    *,
    grpo: GRPOConfig,
    loss: ClippedPG,
    num_updates: int,
) -> None:
    """Train until the steps are done, a signal arrives or time is up; the journal says which."""
    if grpo.val_at_start and journal.first_step == 1:
        with journal.phase("validation"):
            journal.record_validation(0, validate(0))
    for step in journal.steps():
        drawn = rollouts.next(step, journal)
        groups = drawn.groups
        rewards_PG = scaled(rewards_of(groups), grpo.reward_scaling)
        counted_PG = ~truncated(groups) if grpo.overlong_filtering else None
        advantages_PG = advantages(rewards_PG, counted_PG, grpo)
        batch = rollout_batch(groups, advantages_PG, counted_PG)
        with journal.phase("logprobs"):
            batch = prepared(batch, policy, grpo, loss.config, num_updates)
        with journal.phase("train"):
            stats = update(policy, batch, loss, step, num_updates)
        stats = told(stats, rollout_metrics(groups), drawn.metrics)
        check(step, stats)
        journal.record(step, batch, stats)
        if grpo.validates_after(step, journal.last_step):
            with journal.phase("validation"):
                journal.record_validation(step, validate(step))
