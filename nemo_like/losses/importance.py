"""Importance weights: for tokens that the rollout engine drew, and the policy sees differently."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_like.config.loss import ClippedPGConfig
from nemo_like.ops.sequences import means, spread, sums
from nemo_like.types import TrainBatch


@dataclass(frozen=True)
class ImportanceWeights:
    """One weight per token, and whether it was out of bounds (None where there are none).

    Source: see `importance_weights`.
    """

    values_N: Tensor
    outside_N: Tensor | None


def importance_weights(
    old_N: Tensor, sampled_N: Tensor, batch: TrainBatch, config: ClippedPGConfig
) -> ImportanceWeights:
    """Old policy / rollout engine (constants both), per token or per sequence, kept within bounds.

    Both log-probabilities are 0 at tokens that do not count. All weights are 1 without
    `use_importance_sampling_correction`. A sequence's weight is the product over its tokens.

    An infinite weight is out of bounds like any large one; NaN is in no bounds, and stays, so that
    the step is refused: it says that the engine or the policy is broken.

    Source: `tis`, Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training" (2025), weights above the bound become the bound; `icepop`, Zhao et al., "Small Leak
    Can Sink a Great Ship" (2025), ringtech.notion.site/icepop, weights beyond either bound become
    0; `seq-mask-tis` is NeMo-RL's: the weights of a sequence become 0 if the geometric mean of its
    weights is beyond a bound, and are unbounded otherwise.
    """
    log_weight_N = old_N - sampled_N
    if not config.use_importance_sampling_correction:
        return ImportanceWeights(torch.ones_like(log_weight_N), None)
    lengths_B, num_tokens = batch.lengths_B, len(log_weight_N)
    values_N = log_weight_N.exp()
    if config.sequence_level_importance_ratios:
        total_B = sums(log_weight_N, lengths_B)
        values_N = spread(total_B.exp(), lengths_B, num_tokens).to(log_weight_N.dtype)
    kind = config.truncated_importance_sampling_type
    if kind is None:
        return ImportanceWeights(values_N, None)

    judged_N = values_N
    if kind == "seq-mask-tis":
        mean_B = means(log_weight_N, batch.loss_mask_N, lengths_B)
        judged_N = spread(mean_B.exp(), lengths_B, num_tokens)
    low = config.truncated_importance_sampling_ratio_min or 0.0
    high = config.truncated_importance_sampling_ratio
    assert high is not None, "a rule of the config"
    outside_N = (judged_N < low) | (judged_N > high)
    if kind == "tis":
        return ImportanceWeights(values_N.clamp(low, high), outside_N)
    return ImportanceWeights(torch.where(outside_N, 0.0, values_N), outside_N)
