"""How far apart engine, old and present policy are on the tokens of a micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_like.config.loss import ClippedPGConfig
from nemo_like.losses.importance import ImportanceWeights
from nemo_like.ops.kl import kl_estimate
from nemo_like.ops.sequences import sums
from nemo_like.types import Metric, Metrics, TrainBatch


@torch.no_grad()
def policy_metrics(
    config: ClippedPGConfig,
    batch: TrainBatch,
    *,
    current_N: Tensor,
    old_N: Tensor,
    ratio_N: Tensor,
    weights: ImportanceWeights,
    kl_N: Tensor | None,
) -> Metrics:
    """Means per counted token, least and greatest values, and the number of sequences that count.

    The names are NeMo-RL's. In terms of the probabilities of a drawn token, where "trained" is the
    old policy (the present one in the only update of a step) and "engine" what drew it:
        token_mult_prob_error (_max): the larger over the smaller of trained and engine; 1 is equal.
        gen_kl_error, policy_kl_error: KL(engine || trained), KL(trained || engine), nats, each as
            if its first had drawn the tokens, by the estimator of `reference_policy_kl_type`.
        js_divergence_error: Jensen-Shannon divergence of the two, nats.
        approx_entropy: of the present policy, nats, from the engine's tokens.
        probs_ratio (_min, _max): present over old policy; _clamped: what the clip leaves of it.
        clip_fraction_low, _high: tokens whose gradient the lower, the upper clip takes away; of
            CISPO, tokens whose weight it bounds.
        kl_penalty: KL(present || start weights) before its coefficient, after the clamps.
        sampling_importance_ratio: the importance weight in use; is_oob_ratio: those out of bounds.
        num_valid_samples: sequences with a counted token.

    All arithmetic is in fp64, and one transfer brings the results from the device.
    """
    sampled_N, mask_N = batch.sampled_logprobs_N, batch.loss_mask_N
    assert sampled_N is not None
    gap_N = (old_N - sampled_N).double()
    error_N = gap_N.abs().exp()
    zero_N = torch.zeros_like(gap_N)
    kind = config.reference_policy_kl_type
    means = {
        "token_mult_prob_error": error_N,
        "gen_kl_error": kl_estimate(zero_N, gap_N, kind),
        "policy_kl_error": kl_estimate(gap_N, zero_N, kind),
        "js_divergence_error": _js_divergence(gap_N),
        "approx_entropy": -(current_N - sampled_N).double().exp() * current_N,
        "probs_ratio": ratio_N,
        "sampling_importance_ratio": weights.values_N,
    }
    extremes = {"probs_ratio": ratio_N}
    if kl_N is not None:
        means["kl_penalty"] = kl_N
    if weights.outside_N is not None:
        means["is_oob_ratio"] = weights.outside_N
    if not config.disable_ppo_ratio:
        clipped = _clipping(config, batch, ratio_N)
        means |= clipped
        extremes["probs_ratio_clamped"] = clipped["probs_ratio_clamped"]

    rows = [mask_N.sum(), (sums(mask_N, batch.lengths_B) > 0).sum(), _highest(error_N, mask_N)]
    rows += [torch.where(mask_N, values_N, 0.0).double().sum() for values_N in means.values()]
    for values_N in extremes.values():
        rows += [-_highest(-values_N, mask_N), _highest(values_N, mask_N)]
    num_tokens, num_sequences, greatest_error, *values = torch.stack(
        [row.double() for row in rows]
    ).tolist()

    metrics: Metrics = {"num_valid_samples": Metric(num_sequences, "sum")}
    if num_tokens == 0:
        return metrics
    metrics["token_mult_prob_error_max"] = Metric(greatest_error, "max")
    for name, total in zip(means, values, strict=False):
        metrics[name] = Metric(total / num_tokens, "mean", weight=num_tokens)
    bounds = values[len(means) :]
    for name, least, greatest in zip(extremes, bounds[::2], bounds[1::2], strict=True):
        metrics[f"{name}_min"] = Metric(least, "min")
        metrics[f"{name}_max"] = Metric(greatest, "max")
    return metrics


def _clipping(config: ClippedPGConfig, batch: TrainBatch, ratio_N: Tensor) -> dict[str, Tensor]:
    """What the clip leaves of the ratio, and the tokens that each of its ends acts on."""
    advantages_N = batch.advantages_N
    assert advantages_N is not None
    low, high = 1 - config.ratio_clip_min, 1 + config.ratio_clip_max
    sinks_N, rises_N = advantages_N < 0, advantages_N > 0
    if config.use_cispo:
        sinks_N = rises_N = advantages_N != 0
    return {
        "probs_ratio_clamped": ratio_N.clamp(low, high),
        "clip_fraction_low": (ratio_N < low) & sinks_N,
        "clip_fraction_high": (ratio_N > high) & rises_N,
    }


def _js_divergence(gap_N: Tensor) -> Tensor:
    """An unbiased, non-negative estimate from each token that the engine drew.

    With r = trained / engine it is (r ln r - (1 + r) ln((1 + r) / 2)) / 2, whose minimum is 0 at
    r = 1.

    Source: Lin, "Divergence measures based on the Shannon entropy" (1991), eq. 3.1, as an
    expectation over the engine's tokens.
    """
    ratio_N = gap_N.exp()
    return (ratio_N * gap_N - (1 + ratio_N) * torch.log1p((ratio_N - 1) / 2)) / 2


def _highest(values_N: Tensor, mask_N: Tensor) -> Tensor:
    if not values_N.numel():
        return values_N.new_zeros(())
    return torch.where(mask_N, values_N, -torch.inf).amax()
