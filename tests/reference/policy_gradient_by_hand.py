"""The losses of GRPO and its relatives as their papers write them, token by token, in plain floats.

Each function gives a value and its derivative by the log-probability of the token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass
class Sequence:
    """The counted tokens of one completion; nothing else of it matters."""

    logprobs: list[float]
    old: list[float]
    sampled: list[float]
    ref: list[float]
    advantage: float


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def surrogate(config, ratio: float, logprob: float, advantage: float) -> tuple[float, float]:
    """To be made small; the derivative is that by the logarithm of the ratio."""
    low, high = 1 - config.ratio_clip_min, 1 + config.ratio_clip_max
    if config.disable_ppo_ratio:
        return -advantage * logprob, -advantage
    if config.use_cispo:
        weight = -advantage * clip(ratio, low, high)
        return weight * logprob, weight
    plain = advantage * ratio
    objective = min(plain, advantage * clip(ratio, low, high))
    if config.ratio_clip_c is not None and advantage < 0:
        objective = max(objective, config.ratio_clip_c * advantage)
    return -objective, -plain if objective == plain else 0.0


def kl(config, logprob: float, sampled: float, ref: float) -> tuple[float, float]:
    unclamped = ref - logprob
    bound = config.kl_input_clamp_value or math.inf
    x = clip(unclamped, -bound, bound)
    value, slope = {
        "k1": (-x, 1.0),
        "k2": (x * x / 2, -x),
        "k3": (math.exp(x) - 1 - x, 1 - math.exp(x)),
    }[config.reference_policy_kl_type]
    weight = math.exp(logprob - sampled) if config.use_on_policy_kl_approximation else 1.0
    limit = config.kl_output_clamp_value or math.inf
    if abs(unclamped) > bound or abs(weight * value) > limit:
        return clip(weight * value, -limit, limit), 0.0
    return weight * value, weight * (value + slope)


def importance(config, sequence: Sequence) -> list[float]:
    gaps = [o - s for o, s in zip(sequence.old, sequence.sampled, strict=True)]
    if not config.use_importance_sampling_correction:
        return [1.0 for _ in gaps]
    weights = [math.exp(gap) for gap in gaps]
    if config.sequence_level_importance_ratios:
        weights = [math.prod(weights)] * len(weights)
    low = config.truncated_importance_sampling_ratio_min or 0.0
    high = config.truncated_importance_sampling_ratio
    match config.truncated_importance_sampling_type:
        case None:
            return weights
        case "tis":
            return [clip(w, low, high) for w in weights]
        case "icepop":
            return [w if low <= w <= high else 0.0 for w in weights]
        case "seq-mask-tis":
            keep = low <= math.exp(fmean(gaps)) <= high
            return [w if keep else 0.0 for w in weights]


def loss(config, sequences: list[Sequence]) -> tuple[float, list[list[float]]]:
    """The loss of a whole batch, and its derivative by each log-probability."""
    sequences = [s for s in sequences if s.logprobs]
    num_tokens = sum(len(s.logprobs) for s in sequences)
    total, slopes = 0.0, []
    for s in sequences:
        n = len(s.logprobs)
        if config.loss_divisor_tokens is not None:
            share = 1 / (len(sequences) * config.loss_divisor_tokens)
        elif config.token_level_loss:
            share = 1 / num_tokens
        else:
            share = 1 / (len(sequences) * n)
        weights = importance(config, s)
        gaps = [c - o for c, o in zip(s.logprobs, s.old, strict=True)]
        derivative = []
        if config.sequence_level_importance_ratios:  # GSPO, eq. 5: one term for the sequence
            value, slope = surrogate(config, math.exp(fmean(gaps)), 0.0, s.advantage)
            assert len(set(weights)) == 1
            total += weights[0] * value / len(sequences)
            derivative = [weights[0] * slope / n / len(sequences)] * n
        else:
            for t in range(n):
                ratio = 1.0 if config.force_on_policy_ratio else math.exp(gaps[t])
                value, slope = surrogate(config, ratio, s.logprobs[t], s.advantage)
                total += share * weights[t] * value
                derivative.append(share * weights[t] * slope)
        if config.reference_policy_kl_penalty and not config.use_kl_in_reward:
            for t in range(n):
                value, slope = kl(config, s.logprobs[t], s.sampled[t], s.ref[t])
                total += share * config.reference_policy_kl_penalty * value
                derivative[t] += share * config.reference_policy_kl_penalty * slope
        slopes.append(derivative)
    return total, slopes


def advantages(rewards, valid, *, leave_one_out: bool, divide_by_std: bool) -> list[float]:
    """Of one group."""
    result = []
    for i, reward in enumerate(rewards):
        peers = [r for j, r in enumerate(rewards) if valid[j] and not (leave_one_out and j == i)]
        if not valid[i] or not peers:
            result.append(0.0)
            continue
        difference = reward - fmean(peers)
        spread = stdev(peers) if len(peers) > 1 else 0.0
        result.append(difference / (spread + 1e-6) if divide_by_std and spread else difference)
    return result
