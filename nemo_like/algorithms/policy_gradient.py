"""What the pages of GRPO and DAPO share: advantages, the frozen quantities of a step, its updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from nemo_like.config.grpo import GRPOConfig, RewardScalingConfig
from nemo_like.config.loss import ClippedPGConfig
from nemo_like.interfaces import Loss, Policy
from nemo_like.observability.metrics import reduce
from nemo_like.ops.advantages import clip_advantages, group_relative, standardize
from nemo_like.ops.kl import kl_estimate, penalize
from nemo_like.ops.rewards import scale_rewards
from nemo_like.types import Metrics, SamplingParams, StepStats, TrainBatch


def draw(sampling: SamplingParams, step: int, batch: int = 0) -> SamplingParams:
    """The same parameters with the dice of this step, and of this batch of it."""
    return replace(sampling, seed=(sampling.seed << 40) + (step << 12) + batch)


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


def update(policy: Policy, batch: TrainBatch, loss: Loss, num_updates: int) -> StepStats:
    """One optimizer step on each of `num_updates` equal parts of the batch, in order."""
    stats = [policy.train_step(part, loss) for part in batch.split(num_updates)]
    phases: dict[str, float] = {}
    for one in stats:
        for name, seconds in one.phases.items():
            phases[name] = phases.get(name, 0.0) + seconds
    return StepStats(reduce(one.metrics for one in stats), phases)


def told(stats: StepStats, more: Sequence[Metrics]) -> StepStats:
    """The stats with further metrics."""
    metrics = dict(stats.metrics)
    for own in more:
        metrics |= own
    return replace(stats, metrics=metrics)
