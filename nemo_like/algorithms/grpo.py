"""GRPO: sample groups of answers, compare each with its group, and make the better ones likelier.

Source: Shao et al., DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nemo_like.algorithms.policy_gradient import (
    advantages,
    draw,
    prepared,
    scaled,
    told,
    update,
)
from nemo_like.config.grpo import GRPOConfig
from nemo_like.interfaces import Environment, Generator, Journal, Policy
from nemo_like.losses.clipped_pg import ClippedPG
from nemo_like.rollout.collect import (
    collect,
    rewards_of,
    rollout_batch,
    rollout_metrics,
    truncated,
)
from nemo_like.types import Metrics, Prompt, SamplingParams, StepStats

Validate = Callable[[int], Metrics]
"""Given the step, what a validation found."""
Check = Callable[[int, StepStats], None]
"""Given the step and what it did, raises or speaks up if engine and policy have drifted apart."""


class PromptStream(Protocol):
    """An endless, resumable stream of prompts."""

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts."""
        ...


def train(
    policy: Policy,
    generator: Generator,
    environment: Environment,
    prompts: PromptStream,
    validate: Validate,
    journal: Journal,
    check: Check,
    *,
    grpo: GRPOConfig,
    loss: ClippedPG,
    sampling: SamplingParams,
    num_updates: int,
) -> None:
    """Train until the steps are done, a signal arrives or time is up; the journal says which."""
    if grpo.val_at_start and journal.first_step == 1:
        with journal.phase("validation"):
            journal.record_validation(0, validate(0))
    for step in journal.steps():
        with journal.phase("sync"):
            generator.sync(policy)
        with journal.phase("rollout"):
            groups = collect(
                prompts.take(grpo.num_prompts_per_step),
                generator,
                environment,
                draw(sampling, step),
                num_samples=grpo.num_generations_per_prompt,
            )
        rewards_PG = scaled(rewards_of(groups), grpo.reward_scaling)
        counted_PG = ~truncated(groups) if grpo.overlong_filtering else None
        advantages_PG = advantages(rewards_PG, counted_PG, grpo)
        batch = rollout_batch(groups, advantages_PG, counted_PG)
        with journal.phase("logprobs"):
            batch = prepared(batch, policy, grpo, loss.config, num_updates)
        with journal.phase("train"):
            stats = update(policy, batch, loss, num_updates)
        check(step, stats)
        journal.record(step, batch, told(stats, rollout_metrics(groups)))
        if grpo.validates_after(step, journal.last_step):
            with journal.phase("validation"):
                journal.record_validation(step, validate(step))
