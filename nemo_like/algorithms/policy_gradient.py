"""What the pages of GRPO and DAPO share: rewards, advantages, what a step keeps fixed, updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from nemo_like.config.grpo import GRPOConfig, RewardScalingConfig, RewardShapingConfig
from nemo_like.config.loss import ClippedPGConfig
from nemo_like.errors import NoSignalError
from nemo_like.interfaces import Loss, Policy
from nemo_like.observability.metrics import reduce
from nemo_like.ops.advantages import clip_advantages, group_relative, standardize
from nemo_like.ops.kl import kl_estimate, penalize
from nemo_like.ops.rewards import penalize_truncated, scale_rewards, shape_overlong
from nemo_like.rollout.collect import lengths_of, truncated
from nemo_like.types import Group, Metrics, StepStats, TrainBatch


def scaled(rewards_PG: Tensor, config: RewardScalingConfig) -> Tensor:
    """The rewards on their new scale, if there is one. Shapes: [P, G]."""
    if not config.enabled:
        return rewards_PG
    return scale_rewards(
        rewards_PG,
        source_min=config.source_min,
        source_max=config.source_max,
        target_min=config.target_min,
        target_max=config.target_max,
    )


def shaped(rewards_PG: Tensor, groups: Sequence[Group], config: RewardShapingConfig) -> Tensor:
    """The rewards after what long answers cost, if they do. Shapes: [P, G]."""
    if not config.enabled:
        return rewards_PG
    if config.stop_properly_penalty_coef is not None:
        return penalize_truncated(
            rewards_PG, truncated(groups), coefficient=config.stop_properly_penalty_coef
        )
    assert config.max_response_length is not None, "decided when the run was built"
    return shape_overlong(
        rewards_PG,
        lengths_of(groups),
        max_response_length=config.max_response_length,
        overlong_buffer_length=config.overlong_buffer_length,
        overlong_buffer_penalty=config.overlong_buffer_penalty,
    )


def advantages(rewards_PG: Tensor, counted_PG: Tensor | None, grpo: GRPOConfig) -> Tensor:
    """How much better each sample is than its group, before anything is done per token.

    Shapes: [P, G].
    """
    if grpo.adv_estimator.name == "grpo":
        return group_relative(
            rewards_PG,
            counted_PG,
            leave_one_out=grpo.use_leave_one_out_baseline,
            divide_by_std=grpo.normalize_rewards,
        )
    if not grpo.adv_estimator.minus_baseline:
        return rewards_PG
    return group_relative(rewards_PG, counted_PG, leave_one_out=False, divide_by_std=False)


def prepared(
    batch: TrainBatch, policy: Policy, grpo: GRPOConfig, loss: ClippedPGConfig, num_updates: int
) -> TrainBatch:
    """The batch with what stays fixed while it is trained on.

    The old log-probabilities are computed only where several updates drift away from them, or a
    divergence is measured with them; those of the start weights only where a divergence counts.
    """
    if loss.needs_reference:
        batch = replace(batch, ref_logprobs_N=policy.logprobs(batch, reference=True))
    if num_updates > 1 or loss.use_kl_in_reward:
        batch = replace(batch, old_logprobs_N=policy.logprobs(batch))
    advantages_N = batch.advantages_N
    assert advantages_N is not None
    if loss.use_kl_in_reward:
        assert batch.old_logprobs_N is not None and batch.ref_logprobs_N is not None
        kl_N = kl_estimate(
            batch.old_logprobs_N,
            batch.ref_logprobs_N,
            loss.reference_policy_kl_type,
            input_clamp=loss.kl_input_clamp_value,
        )
        advantages_N = penalize(
            advantages_N,
            kl_N * batch.loss_mask_N,
            batch.lengths_B,
            coefficient=loss.reference_policy_kl_penalty,
        )
    if grpo.adv_estimator.name == "reinforce_plus_plus":
        advantages_N = standardize(advantages_N, batch.loss_mask_N)
    low, high = grpo.advantage_clip_low, grpo.advantage_clip_high
    return replace(batch, advantages_N=clip_advantages(advantages_N, low, high))


def update(policy: Policy, batch: TrainBatch, loss: Loss, step: int, num_updates: int) -> StepStats:
    """One optimizer step on each of `num_updates` equal parts of the batch, in order.

    A part without a token that counts is left out.

    Raises:
        NoSignalError: they are all without.
    """
    parts = [part for part in batch.split(num_updates) if part.num_loss_tokens]
    if not parts:
        raise NoSignalError(
            f"step {step}: all {len(batch)} answers were cut off, and grpo.overlong_filtering=true "
            "leaves such out: raise policy.generation.max_new_tokens, or set "
            "grpo.overlong_filtering=false"
        )
    stats = [policy.train_step(part, loss, step=step) for part in parts]
    phases: dict[str, float] = {}
    for one in stats:
        for name, seconds in one.phases.items():
            phases[name] = phases.get(name, 0.0) + seconds
    metrics = reduce(one.metrics for one in stats)
    for name, metric in metrics.items():
        if metric.reduction == "sum":  # over the ranks of one update; of several it is their mean
            metrics[name] = replace(metric, value=metric.value / len(stats))
    return StepStats(metrics, phases, skipped=any(one.skipped for one in stats))


def told(stats: StepStats, *more: Metrics) -> StepStats:
    """The stats with further metrics."""
    metrics = dict(stats.metrics)
    for own in more:
        metrics |= own
    return replace(stats, metrics=metrics)
