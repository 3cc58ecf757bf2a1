"""What becomes of an environment's rewards before they are compared.

All functions are element by element, so rows stay rows: a raw reward and what was made of it are
at the same place of two tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

SOLVED = 1.0
"""What an environment gives a right answer, before anything is made of it; less is in part."""


def is_solved(reward: float) -> bool:
    """Whether an answer with this reward of an environment is right."""
    return reward >= SOLVED


def scale_rewards(
    rewards: Tensor, *, source_min: float, source_max: float, target_min: float, target_max: float
) -> Tensor:
    """Rewards clamped to the source range, and mapped in a straight line onto the target range.

    Example: 0 and 1 become -1 and 1 with the target range -1 ... 1.
    """
    share = (rewards.clamp(source_min, source_max) - source_min) / (source_max - source_min)
    return target_min + share * (target_max - target_min)


def shape_overlong(
    rewards: Tensor,
    lengths: Tensor,
    *,
    max_response_length: int,
    overlong_buffer_length: int,
    overlong_buffer_penalty: float,
) -> Tensor:
    """Rewards less a penalty that grows from 0 to its full size over the last tokens allowed.

    `lengths` counts the tokens of each completion. The penalty starts at `max_response_length -
    overlong_buffer_length` tokens, is `overlong_buffer_penalty` at `max_response_length`, and never
    more.

    Source: DAPO (arXiv:2503.14476), eq. 13. (NeMo-RL lets it grow on.)
    """
    excess = lengths - (max_response_length - overlong_buffer_length)
    share = (excess / overlong_buffer_length).clamp(0.0, 1.0)
    return rewards - overlong_buffer_penalty * share.to(rewards.dtype)


def penalize_truncated(rewards: Tensor, truncated: Tensor, *, coefficient: float) -> Tensor:
    """Rewards in which a completion that did not stop by itself keeps this share of its own.

    A reward below 0 is left alone: a smaller part of it would be a prize for not stopping.

    Args:
        rewards: After scaling.
        truncated: Completions that ended at their length limit.
        coefficient: From 0 to 1.
    """
    return torch.where(truncated & (rewards > 0), coefficient * rewards, rewards)


def has_signal(rewards_PG: Tensor, valid_PG: Tensor | None = None) -> Tensor:
    """Groups whose samples that count have not all the same reward. Shapes: [P], bool.

    From the comparison of rewards, so it is exact: it says no just where every advantage relative
    to the group is 0.

    Source: the condition of dynamic sampling, DAPO (arXiv:2503.14476), eq. 11, for any rewards.
    """
    if valid_PG is None:
        valid_PG = torch.ones_like(rewards_PG, dtype=torch.bool)
    lowest = torch.where(valid_PG, rewards_PG, torch.inf).amin(-1)
    highest = torch.where(valid_PG, rewards_PG, -torch.inf).amax(-1)
    return highest > lowest
