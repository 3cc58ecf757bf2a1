"""The clipped policy gradient: GRPO, DAPO, Dr. GRPO, GSPO and CISPO are settings of one loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_like.config.loss import ClippedPGConfig
from nemo_like.losses.importance import importance_weights
from nemo_like.losses.policy_metrics import policy_metrics
from nemo_like.ops.kl import kl_loss
from nemo_like.ops.sequences import means, spread, sums
from nemo_like.types import Metrics, TrainBatch


@dataclass(frozen=True)
class ClippedPG:
    """max(-A r, -A clip(r)) per token, weighted, plus KL, as a mean over the global batch.

    A is the advantage and r = policy / old policy, the ratio of a token's probabilities.

    The batch must carry `advantages_N` and `sampled_logprobs_N`, with a KL term `ref_logprobs_N`
    too. Without `old_logprobs_N` the old policy is the present one: r is 1 and has a gradient.

    A NaN among the log-probabilities of counted tokens makes the loss NaN, which the backend
    refuses; none is turned into a weight of 0.

    Source:
        The clip is PPO (arXiv:1707.06347), eq. 7. Per token with group-relative advantages and KL:
        GRPO (arXiv:2402.03300), eq. 3; its mean per sequence is `token_level_loss=false`.
        Two sides of the clip (`ratio_clip_min`, `ratio_clip_max`) and the mean over all tokens:
        DAPO (arXiv:2503.14476), eq. 8.
        `loss_divisor_tokens`: Dr. GRPO (arXiv:2503.20783), section 3.2.
        `ratio_clip_c`: dual-clip PPO (arXiv:1912.09729), section "Dual-clip PPO".
        `sequence_level_importance_ratios`: GSPO (arXiv:2507.18071), eqs. 5 and 7, computed as its
        token variant, section 4.3, which has the same value and gradient where all tokens of a
        sequence share one advantage.
        `use_cispo`: MiniMax-M1 (arXiv:2506.13585), eqs. 4 and 5.
        `disable_ppo_ratio`: REINFORCE (Williams, 1992).
        Importance weights: see `importance.py`; KL: see `kl_loss`.
    """

    config: ClippedPGConfig

    def __call__(self, logprobs_N: Tensor, batch: TrainBatch) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the loss, and metrics per counted token."""
        mask_N = batch.loss_mask_N
        current_N = _counted(logprobs_N, mask_N)
        advantages_N = _counted(batch.advantages_N, mask_N)
        sampled_N = _counted(batch.sampled_logprobs_N, mask_N)
        old_N = current_N.detach()
        if batch.old_logprobs_N is not None:
            old_N = _counted(batch.old_logprobs_N, mask_N)

        ratio_N = self._ratio(current_N, old_N, batch)
        weights = importance_weights(old_N, sampled_N, batch, self.config)
        loss_N = weights.values_N * self._surrogate(ratio_N, current_N, advantages_N)
        kl_N = None
        if self.config.has_kl_in_loss:
            kl_N = self._kl(current_N, sampled_N, _counted(batch.ref_logprobs_N, mask_N))
            loss_N = loss_N + self.config.reference_policy_kl_penalty * kl_N
        metrics = policy_metrics(
            self.config,
            batch,
            current_N=current_N,
            old_N=old_N,
            ratio_N=ratio_N,
            weights=weights,
            kl_N=kl_N,
        )
        return (loss_N * self._shares(batch, loss_N.dtype)).sum(), metrics

    def _ratio(self, current_N: Tensor, old_N: Tensor, batch: TrainBatch) -> Tensor:
        """The probability of each token, or the geometric mean of its sequence's, policy / old."""
        now_N = current_N.detach()
        anchor_N = now_N if self.config.force_on_policy_ratio else old_N
        if not self.config.sequence_level_importance_ratios:
            return (current_N - anchor_N).exp()
        mean_B = means(now_N - anchor_N, batch.loss_mask_N, batch.lengths_B)
        ratio_N = spread(mean_B.exp(), batch.lengths_B, len(now_N)).to(now_N.dtype)
        return ratio_N * (current_N - now_N).exp()

    def _surrogate(self, ratio_N: Tensor, current_N: Tensor, advantages_N: Tensor) -> Tensor:
        """What descends where the policy improves, per token."""
        config = self.config
        if config.disable_ppo_ratio:
            return -advantages_N * current_N
        clipped_N = ratio_N.clamp(1 - config.ratio_clip_min, 1 + config.ratio_clip_max)
        if config.use_cispo:
            return -advantages_N * clipped_N.detach() * current_N
        loss_N = torch.maximum(-advantages_N * ratio_N, -advantages_N * clipped_N)
        if config.ratio_clip_c is not None:
            bounded_N = torch.minimum(loss_N, -advantages_N * config.ratio_clip_c)
            loss_N = torch.where(advantages_N < 0, bounded_N, loss_N)
        return loss_N

    def _kl(self, current_N: Tensor, sampled_N: Tensor, ref_N: Tensor) -> Tensor:
        config = self.config
        return kl_loss(
            current_N,
            ref_N,
            config.reference_policy_kl_type,
            sampled_logprobs=sampled_N if config.use_on_policy_kl_approximation else None,
            input_clamp=config.kl_input_clamp_value,
            output_clamp=config.kl_output_clamp_value,
        )

    def _shares(self, batch: TrainBatch, dtype: torch.dtype) -> Tensor:
        """Each token's part in the mean over the global batch; 0 outside of the loss."""
        mask_N = batch.loss_mask_N.to(dtype)
        if self.config.loss_divisor_tokens is not None:
            return mask_N / (batch.num_sequences * self.config.loss_divisor_tokens)
        if self.config.token_level_loss:
            return mask_N / batch.num_loss_tokens
        counts_B = sums(batch.loss_mask_N, batch.lengths_B).clamp(min=1.0)
        share_B = 1.0 / (counts_B * batch.num_sequences)
        return mask_N * spread(share_B, batch.lengths_B, len(mask_N)).to(dtype)


def _counted(values_N: Tensor | None, mask_N: Tensor) -> Tensor:
    """The values of counted tokens, 0 at all others, whatever (even NaN) stands there."""
    assert values_N is not None, "the algorithm puts all that its loss needs into the batch"
    return torch.where(mask_N, values_N, 0.0)
