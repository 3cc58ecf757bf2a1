"""From prompts to judged groups of rollouts, and from those to what a policy trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nemo_like.errors import DataError
from nemo_like.interfaces import Environment, Generator
from nemo_like.ops.rewards import has_signal
from nemo_like.types import Example, Group, Metric, Metrics, Prompt, SamplingParams, TrainBatch


def collect(
    prompts: Sequence[Prompt],
    generator: Generator,
    environment: Environment,
    sampling: SamplingParams,
    *,
    num_samples: int,
) -> list[Group]:
    """A group of `num_samples` rollouts for each prompt, in the order of the prompts.

    Raises:
        DataError: the environment's rewards are too few, too many, or not finite.
    """
    asked = [prompt for prompt in prompts for _ in range(num_samples)]
    rollouts = generator.generate(asked, sampling)
    rewards = environment.score(rollouts)
    if len(rewards) != len(rollouts) or not all(map(math.isfinite, rewards)):
        odd = next((i for i, r in enumerate(rewards) if not math.isfinite(r)), None)
        where = "" if odd is None else f"; {rewards[odd]} for {rollouts[odd].text[:200]!r}"
        raise DataError(
            f"{type(environment).__name__} gave {len(rewards)} rewards for {len(rollouts)} "
            f"rollouts, expected one finite number each{where}"
        )
    return [
        Group(
            prompt,
            tuple(rollouts[i * num_samples : (i + 1) * num_samples]),
            tuple(rewards[i * num_samples : (i + 1) * num_samples]),
        )
        for i, prompt in enumerate(prompts)
    ]


def rewards_of(groups: Sequence[Group]) -> Tensor:
    """The rewards as the environment gave them. Shapes: [P, G], fp64."""
    return torch.tensor([group.rewards for group in groups], dtype=torch.float64)


def lengths_of(groups: Sequence[Group]) -> Tensor:
    """Tokens that the model wrote in each rollout. Shapes: [P, G]."""
    return torch.tensor([[r.num_sampled for r in group.rollouts] for group in groups])


def truncated(groups: Sequence[Group]) -> Tensor:
    """Rollouts that ended at a limit of length. Shapes: [P, G], bool."""
    return torch.tensor([[r.finish_reason == "length" for r in g.rollouts] for g in groups])


def rollout_batch(
    groups: Sequence[Group], advantages_PG: Tensor, counted_PG: Tensor | None = None
) -> TrainBatch:
    """Prompts with rollouts, each token that the model wrote with its sample's advantage.

    Tokens of prompts and replies count in nothing; neither do samples that `counted_PG` (bool) is
    false for, which stay in the batch.
    """
    examples, counted, sampled, advantages = [], [], [], []
    for p, group in enumerate(groups):
        for g, rollout in enumerate(group.rollouts):
            before, is_sampled = len(group.prompt.token_ids), rollout.is_sampled
            counts = counted_PG is None or bool(counted_PG[p, g])
            mask = (False,) * before + tuple(own and counts for own in is_sampled)
            examples.append(Example(group.prompt.token_ids + rollout.token_ids, mask))
            counted.append(counts)
            sampled += [0.0] * before + list(rollout.sampled_logprobs)
            advantage = float(advantages_PG[p, g])
            advantages += [0.0] * before + [advantage if own else 0.0 for own in is_sampled]
    return replace(
        TrainBatch.of(examples),
        num_sequences=sum(counted),
        sampled_logprobs_N=torch.tensor(sampled, dtype=torch.float32),
        advantages_N=torch.tensor(advantages, dtype=torch.float32),
    )


def rollout_metrics(groups: Sequence[Group]) -> Metrics:
    """What came out: rewards, lengths, and how many groups can teach anything."""
    rewards, lengths = rewards_of(groups), lengths_of(groups).double()
    turns = [rollout.num_turns for group in groups for rollout in group.rollouts]
    return {
        "reward": Metric(float(rewards.mean())),
        "reward_std": Metric(float(rewards.std(correction=0))),
        "mixed_groups": Metric(float(has_signal(rewards).double().mean())),
        "mean_gen_tokens_per_sample": Metric(float(lengths.mean())),
        "max_gen_tokens_per_sample": Metric(float(lengths.amax())),
        "avg_turns_per_sample": Metric(sum(turns) / len(turns)),
        "truncation_rate": Metric(float(truncated(groups).double().mean())),
    }
