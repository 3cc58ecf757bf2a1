"""How often a policy answers held-out problems right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_like.interfaces import Environment, Generator, WeightSource
from nemo_like.types import Metric, Metrics, Prompt, Rollout, SamplingParams


@dataclass(frozen=True)
class Evaluation:
    """Answers to held-out prompts, and what each is worth."""

    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]

    def metrics(self) -> Metrics:
        """Mean reward, tokens and turns of the answers, and the share that was cut off."""
        n = len(self.rollouts)
        lengths = [r.num_sampled for r in self.rollouts]
        cut = sum(r.finish_reason == "length" for r in self.rollouts)
        return {
            "accuracy": Metric(sum(self.rewards) / n, "mean", weight=n),
            "answer_tokens": Metric(sum(lengths) / n, "mean", weight=n),
            "turns": Metric(sum(r.num_turns for r in self.rollouts) / n, "mean", weight=n),
            "truncated": Metric(cut / n, "mean", weight=n),
        }


def evaluate(
    policy: WeightSource,
    generator: Generator,
    environment: Environment,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    num_samples: int = 1,
    batch_size: int | None = None,
) -> Evaluation:
    """Each prompt answered with the policy's weights of now, and judged.

    The `num_samples` of a prompt follow each other. `batch_size` prompts are given to the generator
    at the same time, or all.
    """
    generator.sync(policy)
    rollouts: list[Rollout] = []
    rewards: list[float] = []
    size = batch_size or len(prompts) or 1
    for at in range(0, len(prompts), size):
        asked = [prompt for prompt in prompts[at : at + size] for _ in range(num_samples)]
        answers = generator.generate(asked, sampling)
        rollouts += answers
        rewards += environment.score(answers)
    return Evaluation(tuple(rollouts), tuple(rewards))
