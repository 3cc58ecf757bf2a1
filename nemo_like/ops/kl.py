"""KL divergence between two policies, estimated from tokens that one of them drew."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nemo_like.ops.sequences import spread, sums

KLType = Literal["k1", "k2", "k3"]


def kl_estimate(
    logprobs: Tensor, other_logprobs: Tensor, kind: KLType, *, input_clamp: float | None = None
) -> Tensor:
    """An estimate of KL(policy || other) in nats, from each token that the *policy* drew.

    Shapes: any, the same for all.

    With log r = log other - log policy: k1 = -log r (unbiased, of either sign), k2 = (log r)^2 / 2
    (biased, never negative), k3 = r - 1 - log r (unbiased and never negative). `input_clamp`
    bounds |log r| first; beyond it the estimate has no gradient.

    Source: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html;
    k3 is eq. 4 of GRPO (arXiv:2402.03300).
    """
    log_ratio = other_logprobs - logprobs
    if input_clamp is not None:
        log_ratio = log_ratio.clamp(-input_clamp, input_clamp)
    match kind:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            # expm1 keeps what exp(x) - 1 loses for two policies that almost agree.
            return log_ratio.expm1() - log_ratio


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: KLType,
    *,
    sampled_logprobs: Tensor | None = None,
    input_clamp: float | None = None,
    output_clamp: float | None = None,
) -> Tensor:
    """What to add to a loss, times a coefficient, for each token: KL to the frozen policy, in nats.

    Shapes: any, the same for all.

    An estimate's gradient is not that of the divergence: the probability of drawing the token
    depends on the weights too. So the estimate is multiplied by policy / sampler, whose gradient is
    that part. Given `sampled_logprobs` the factor also corrects for tokens that another policy
    drew; without, its value is 1. Where a clamp acts there is no gradient, by either way.

    Source: the unbiased KL estimate of DeepSeek-V3.2 (arXiv:2512.02556), section 3.1, eq. 7. GRPO
    (arXiv:2402.03300), eq. 3, has the estimate without the factor.
    """
    log_ratio = ref_logprobs - logprobs
    estimate = kl_estimate(logprobs, ref_logprobs, kind, input_clamp=input_clamp)
    weight = (logprobs - _or(sampled_logprobs, logprobs.detach())).exp()
    if input_clamp is not None:
        weight = torch.where(log_ratio.abs() > input_clamp, weight.detach(), weight)
    weighted = weight * estimate
    return weighted if output_clamp is None else weighted.clamp(-output_clamp, output_clamp)


def penalize(
    advantages_N: Tensor, kl_N: Tensor, lengths_B: Tensor, *, coefficient: float
) -> Tensor:
    """Advantages with KL as a cost of each token, which falls on the tokens that led to it.

    Shapes: [N].

    Token t of a sequence loses `coefficient` times the sum of `kl_N` from t to the end of its
    sequence. `kl_N` (nats) is 0 outside of the loss, and has no gradient.

    Source: REINFORCE++ (arXiv:2501.03262v9), section 3: reward minus beta times the sum of KL to
    come. (NeMo-RL takes the token's own KL alone.)
    """
    kl_N = kl_N.double()
    from_start_N = kl_N.cumsum(0)
    ends_B = sums(kl_N, lengths_B).cumsum(0)
    to_come_N = spread(ends_B, lengths_B, len(kl_N)) - from_start_N + kl_N
    return advantages_N - (coefficient * to_come_N).to(advantages_N.dtype)


def _or(given: Tensor | None, default: Tensor) -> Tensor:
    return default if given is None else given
