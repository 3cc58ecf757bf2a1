"""DAPO: GRPO that draws until every group can teach something, and lets long answers cost.

Its other two ideas, a higher upper clip and the mean over all tokens, are settings of the loss.

Source: Yu et al., DAPO, https://arxiv.org/abs/2503.14476, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable

from nemo_like.algorithms.grpo import Check, Validate
from nemo_like.algorithms.policy_gradient import (
    advantages,
    prepared,
    scaled,
    shaped,
    told,
    update,
)
from nemo_like.config.grpo import GRPOConfig
from nemo_like.errors import NoSignalError
from nemo_like.interfaces import Journal, Policy, RolloutSource
from nemo_like.losses.clipped_pg import ClippedPG
from nemo_like.ops.rewards import has_signal
from nemo_like.rollout.collect import rewards_of, rollout_batch, rollout_metrics, truncated
from nemo_like.types import Drawn, Group, Metric


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
        numbers = range(grpo.dynamic_sampling_max_gen_batches)
        drawn = dynamic_sampling((rollouts.next(step, journal, n) for n in numbers), grpo)
        groups = drawn.groups
        if not groups:
            journal.stop("grpo.on_starvation=stop: too few groups with different rewards")
            continue
        rewards_PG = scaled(rewards_of(groups), grpo.reward_scaling)
        rewards_PG = shaped(rewards_PG, groups, grpo.reward_shaping)
        counted_PG = ~truncated(groups) if grpo.overlong_filtering else None
        advantages_PG = advantages(rewards_PG, counted_PG, grpo)
        batch = rollout_batch(groups, advantages_PG, counted_PG)
        with journal.phase("logprobs"):
            batch = prepared(batch, policy, grpo, loss.config, num_updates)
        with journal.phase("train"):
            stats = update(policy, batch, loss, step, num_updates)
        shaping = {"shaped_reward": Metric(float(rewards_PG.mean()))}
        stats = told(stats, rollout_metrics(groups), drawn.metrics, shaping)
        check(step, stats)
        journal.record(step, batch, stats)
        if grpo.validates_after(step, journal.last_step):
            with journal.phase("validation"):
                journal.record_validation(step, validate(step))


def dynamic_sampling(batches: Iterable[Drawn], grpo: GRPOConfig) -> Drawn:
    """As many groups as a step takes, of whose rewards not all are equal; and what it took.

    Batches are drawn one by one until there are enough; of the last one the rest is left. Judged
    are the rewards as the environment gave them. Without `use_dynamic_sampling` it is the first
    batch as it is.

    Raises:
        NoSignalError: the batches ran out, and `grpo.on_starvation` says `raise`, or not one group
            was found and it says `train_on_kept`. With `stop` there are then no groups at all.

    Source: DAPO, eq. 11.
    """
    needed, kept = grpo.num_prompts_per_step, list[Group]()
    num_batches = num_drawn = 0
    for drawn in batches:
        if not grpo.use_dynamic_sampling:
            return drawn
        groups = drawn.groups
        num_batches, num_drawn = num_batches + 1, num_drawn + len(groups)
        counted_PG = ~truncated(groups) if grpo.overlong_filtering else None
        teaches_P = has_signal(rewards_of(groups), counted_PG).tolist()
        kept += [group for group, teaches in zip(groups, teaches_P, strict=True) if teaches]
        if len(kept) >= needed:
            break
    is_starved = len(kept) < needed
    if is_starved and (grpo.on_starvation == "raise" or not kept and grpo.on_starvation != "stop"):
        raise NoSignalError(
            f"{len(kept)} of {num_drawn} groups in {num_batches} batches have rewards that differ, "
            f"and a step takes {needed}: the problems are too easy or too hard for the policy. "
            "Change the data, raise grpo.num_generations_per_prompt or "
            "grpo.dynamic_sampling_max_gen_batches, or set grpo.on_starvation"
        )
    metrics = {
        "dynamic_sampling_num_gen_batches": Metric(num_batches),
        "dynamic_sampling_num_discarded_valid_samples": Metric(
            max(0, len(kept) - needed) * grpo.num_generations_per_prompt
        ),
        "dynamic_sampling_kept_groups": Metric(len(kept) / num_drawn),
    }
    return Drawn([] if is_starved and grpo.on_starvation == "stop" else kept[:needed], metrics)
