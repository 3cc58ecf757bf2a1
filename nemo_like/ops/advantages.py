"""Advantages: how much better a sample is than what was to be expected of its prompt.

Row p of a tensor [P, G] holds the G samples of one prompt: two rows are two groups, also where
their prompts read the same. Statistics are computed in fp64 from differences to a reward of the
same group, so equal rewards have a deviation of exactly 0, whatever their value is.
"""

from __future__ import annotations

import torch
from torch import Tensor

STD_FLOOR = 1e-6
"""Added to a group's standard deviation: rewards that differ by round-off stay almost equal."""
VARIANCE_FLOOR = 1e-8
"""The smallest variance of a batch that its advantages are divided by the root of."""


def group_relative(
    rewards_PG: Tensor,
    valid_PG: Tensor | None = None,
    *,
    leave_one_out: bool,
    divide_by_std: bool,
) -> Tensor:
    """Reward minus the mean of the group, in units of the group's standard deviation if asked.

    Shapes: [P, G].

    Args:
        rewards_PG: One reward per sample.
        valid_PG: Samples that count; the others have advantage 0, and no part in the statistics.
        leave_one_out: Compare each sample with the mean and deviation of the *others*.
        divide_by_std: Divide by the unbiased standard deviation (n - 1) plus 1e-6.

    A deviation of exactly 0 divides nothing. In a group of equal rewards every advantage is 0
    anyway. A sample whose others all agree among themselves (one right answer among wrong ones, or
    any group of two) keeps its plain difference: there is no scale to measure it with. A sample
    without others that count has advantage 0.

    Source: with `divide_by_std`, GRPO (DeepSeekMath, arXiv:2402.03300), section 4.1.2; without,
    Dr. GRPO (arXiv:2503.20783), section 3.2; `leave_one_out` alone is RLOO (arXiv:2402.14740). The
    deviation of the others, when both are asked for, is NeMo-RL's.
    """
    rewards, valid = _exact(rewards_PG, valid_PG)
    # compared[p, i, j]: does sample j count in the statistics that sample i is measured with?
    num_samples = rewards.shape[1]
    compared = valid[:, None, :].expand(-1, num_samples, -1)
    if leave_one_out:
        compared = compared & ~torch.eye(num_samples, dtype=torch.bool, device=valid.device)
    count = compared.sum(-1)
    offset = torch.where(compared, rewards[:, None, :], torch.inf).amin(-1)
    offset = torch.where(count > 0, offset, rewards)
    above = torch.where(compared, rewards[:, None, :] - offset[:, :, None], 0.0)
    mean = above.sum(-1) / count.clamp(min=1)
    advantages = rewards - offset - mean
    if divide_by_std:
        deviations = torch.where(compared, above - mean[:, :, None], 0.0)
        std = (deviations.square().sum(-1) / (count - 1).clamp(min=1)).sqrt()
        advantages = torch.where(std > 0, advantages / (std + STD_FLOOR), advantages)
    return torch.where(valid, advantages, 0.0).to(rewards_PG.dtype)


def standardize(advantages: Tensor, weights: Tensor) -> Tensor:
    """Advantages with weighted mean 0 and weighted variance 1; 0 where the weight is 0.

    Shapes: any, the same for both. The weights are the loss mask of [N], or the tokens of each
    sample of [P, G], which comes to the same. A variance below 1e-8 counts as 1e-8.

    Source: REINFORCE++ (arXiv:2501.03262v9), section 3, global advantage normalisation, of rewards
    spread over their tokens; of `group_relative` without deviation in its variant "w/ baseline". A
    KL penalty in the reward (`kl.penalize`) comes before.
    """
    values, counts = _exact(advantages, weights > 0)
    weights = weights.double()
    total = weights.sum().clamp(min=1.0)
    offset = torch.where(counts, values, torch.inf).min() if values.numel() else 0.0
    above = torch.where(counts, values - offset, 0.0)
    centred = above - (above * weights).sum() / total
    variance = (centred.square() * weights).sum() / total
    scaled = centred / variance.clamp(min=VARIANCE_FLOOR).sqrt()
    return torch.where(counts, scaled, 0.0).to(advantages.dtype)


def clip_advantages(advantages: Tensor, low: float | None, high: float | None) -> Tensor:
    """Advantages moved into [low, high]; None leaves a side open."""
    return advantages if low is None and high is None else advantages.clamp(low, high)


def _exact(values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values in fp64, and which of them count: all unless it is said."""
    if valid is None:
        valid = torch.ones_like(values, dtype=torch.bool)
    return values.double(), valid
