"""How far engine and policy are apart while both have the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nemo_like.interfaces import Policy
from nemo_like.rollout.collect import rollout_batch
from nemo_like.rollout.source import Drawing, dice
from nemo_like.types import Group, Metric, Metrics, Prompt

PROBE_PROMPTS = 8
PROBE_TOKENS = 16
"""A probe is short, since nothing trains meanwhile."""


def probe(policy: Policy, drawing: Drawing, prompts: Sequence[Prompt], step: int) -> Metrics:
    """`probe_mult_prob_error`: mean over a few fresh tokens of exp |log p(engine) - log p(policy)|.

    To be asked when the engines have just taken the policy's weights. On rollouts of older weights
    the same number would be larger because the policy has learned.
    """
    sampling = dice(drawing.sampling, step)
    sampling = replace(sampling, max_new_tokens=min(PROBE_TOKENS, sampling.max_new_tokens))
    rollouts = drawing.generator.generate(prompts[:PROBE_PROMPTS], sampling)
    groups = [Group(rollout.prompt, (rollout,), (0.0,)) for rollout in rollouts]
    batch = rollout_batch(groups, torch.zeros(len(groups), 1))
    assert batch.sampled_logprobs_N is not None
    gap_N = (policy.logprobs(batch) - batch.sampled_logprobs_N).double()
    error_N = gap_N[batch.loss_mask_N].abs().exp()
    return {"probe_mult_prob_error": Metric(float(error_N.mean()), "mean", len(error_N))}
