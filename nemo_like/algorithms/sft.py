"""Supervised fine-tuning: the loss of the next token on the assistant's turns, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from nemo_like.config.sft import SFTConfig
from nemo_like.interfaces import Journal, Policy
from nemo_like.losses.nll import NLL, mean_nll
from nemo_like.observability.metrics import reduce
from nemo_like.types import Example, Metrics, TrainBatch

Validate = Callable[[int], Metrics]
"""Given the step, what a validation found."""


class ExampleStream(Protocol):
    """An endless, resumable stream of training examples."""

    def take(self, n: int) -> list[Example]:
        """The next n examples."""
        ...


def train(
    policy: Policy,
    examples: ExampleStream,
    validate: Validate,
    journal: Journal,
    *,
    sft: SFTConfig,
    batch_size: int,
) -> None:
    """Train until the steps are done, a signal arrives or time is up; the journal says which."""
    if sft.val_at_start and journal.first_step == 1:
        with journal.phase("validation"):
            journal.record_validation(0, validate(0))
    for step in journal.steps():
        with journal.phase("data"):
            batch = TrainBatch.of(examples.take(batch_size))
        with journal.phase("train"):
            stats = policy.train_step(batch, NLL(), step=step)
        journal.record(step, batch, stats)
        if sft.validates_after(step, journal.last_step):
            with journal.phase("validation"):
                journal.record_validation(step, validate(step))


def validation_loss(policy: Policy, batches: Sequence[TrainBatch]) -> Metrics:
    """The loss on held-out batches, per target token over all of them."""
    return reduce({"val_loss": mean_nll(policy.logprobs(b), b)} for b in batches)
