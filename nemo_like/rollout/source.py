"""Where a step gets its rollouts from: how they are drawn, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from nemo_like.interfaces import Environment, Generator, Journal, WeightSource
from nemo_like.rollout.collect import collect
from nemo_like.types import Drawn, Group, Prompt, SamplingParams


class PromptStream(Protocol):
    """An endless, resumable stream of prompts."""

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts."""
        ...


@dataclass(frozen=True)
class Drawing:
    """How the rollouts of a step are drawn and judged, whenever that is."""

    prompts: PromptStream
    generator: Generator
    environment: Environment
    sampling: SamplingParams
    num_prompts: int
    num_samples: int

    def ask(self) -> list[Prompt]:
        """The next prompts of the data, as many as are drawn together."""
        return self.prompts.take(self.num_prompts)

    def draw(self, prompts: Sequence[Prompt], step: int, batch: int = 0) -> list[Group]:
        """Groups of rollouts of these prompts, with the weights that the generator holds."""
        return collect(
            prompts,
            self.generator,
            self.environment,
            dice(self.sampling, step, batch),
            num_samples=self.num_samples,
        )


class RolloutsOnTime:
    """Draws the rollouts of a step when it begins, with the weights of that moment."""

    def __init__(self, drawing: Drawing, policy: WeightSource) -> None:
        self._drawing = drawing
        self._policy = policy

    def next(self, step: int, journal: Journal, batch: int = 0) -> Drawn:
        """The rollouts that a step trains on; further batches of it, by their number."""
        if batch == 0:
            with journal.phase("sync"):
                self._drawing.generator.sync(self._policy)
        with journal.phase("rollout"):
            return Drawn(self._drawing.draw(self._drawing.ask(), step, batch))


def dice(sampling: SamplingParams, step: int, batch: int = 0) -> SamplingParams:
    """The same parameters with the seed of this step, and of this batch of it."""
    return replace(sampling, seed=(sampling.seed << 40) + (step << 12) + batch)
