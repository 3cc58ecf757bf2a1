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
        """Mean reward, length of the answers in tokens, and the share that was cut off."""
        n = len(self.rollouts)
        lengths = [len(r.token_ids) for r in self.rollouts]
        cut = sum(r.finish_reason == "length" for r in self.rollouts)
        return {
            "accuracy": Metric(sum(self.rewards) / n, "mean", weight=n),
            "answer_tokens": Metric(sum(lengths) / n, "mean", weight=n),
            "truncated": Metric(cut / n, "mean", weight=n),
        }


def evaluate(
    policy: WeightSource,
    generator: Generator,
    environment: Environment,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
) -> Evaluation:
    """Each prompt answered once with the policy's weights of now, and judged."""
    generator.sync(policy)
    rollouts = generator.generate(prompts, sampling)
    return Evaluation(tuple(rollouts), tuple(environment.score(rollouts)))
