"""Negative log-likelihood: the loss of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemo_like.types import Metric, Metrics, TrainBatch


@dataclass(frozen=True)
class NLL:
    """-sum(logprobs of targets) / number of targets of the global batch, in nats per token.

    Source: maximum likelihood with the response as target, e.g. InstructGPT (arXiv:2203.02155),
    section 3.5.
    """

    def __call__(self, logprobs_N: Tensor, batch: TrainBatch) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the loss."""
        loss = -(logprobs_N * batch.loss_mask_N).sum() / batch.num_loss_tokens
        return loss, {}


def mean_nll(logprobs_N: Tensor, batch: TrainBatch) -> Metric:
    """The same from log-probabilities alone, for validation; combines over batches by tokens."""
    loss, _ = NLL()(logprobs_N, batch)
    return Metric(float(loss), "mean", weight=batch.num_loss_tokens)
