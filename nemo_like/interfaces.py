"""The Protocols between the algorithms and the world. Read this file first.

An algorithm sees a `Policy` (the model that learns), a `RolloutSource` (what it learns from) and a
`Journal` (metrics, checkpoints, signals), and nothing of torch.distributed, Ray, vLLM or
transformers. Behind the source are a `Generator` (the engine that samples) and an `Environment`
(what rewards). `PolicyBackend` is one rank's half of a `Policy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from nemo_like.types import (
    Drawn,
    Metrics,
    PolicyFacts,
    Prompt,
    Rollout,
    SamplingParams,
    Shard,
    StepStats,
    TrainBatch,
)


class Loss(Protocol):
    """A loss over one micro-batch; picklable, since it travels to the workers.

    Shapes: `logprobs_N` is aligned with `batch.token_ids_N`: entry t is log p(token t | tokens
    before t in its sequence) where `batch.loss_mask_N` is set, and 0 elsewhere.
    """

    def __call__(self, logprobs_N: Tensor, batch: TrainBatch) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the global loss (the shares sum to it), and metrics."""
        ...


class Trainable(Protocol):
    """What a rank and the whole of a model in training have in common."""

    def begin(self, total_steps: int) -> PolicyFacts:
        """Lay the schedules over this many steps.

        The result names the model, who owns its parameters, and where it runs.
        """
        ...

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write model, optimizer and RNG state; returns once written or (asynchronous) copied."""
        ...

    def save_finished(self) -> bool:
        """Whether the last save is written; raises what went wrong meanwhile."""
        ...

    def load(self, folder: Path) -> None:
        """Take the state that `save` wrote, in whatever layout it was written."""
        ...

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by Hugging Face name, one after the other."""
        ...

    def close(self) -> None:
        """Release processes and memory; safe to call twice."""
        ...


class PolicyBackend(Trainable, Protocol):
    """One rank of a model in training.

    `save` and `load` are of this rank's part. `begin`, `train_step` and `export_weights` are
    collectives: all ranks call (or iterate), and get the same. Parallel forms, packing and offload
    are its private affair.
    """

    def logprobs(self, shard: Shard, reference: bool = False) -> Tensor:
        """Log-probabilities (nats, fp32, no gradient) aligned with `shard.batch.token_ids_N`.

        Those of the weights that training began with, if `reference` is asked for. Shapes: [N].
        """
        ...

    def train_step(self, shard: Shard, loss: Loss, *, step: int | None = None) -> StepStats:
        """Forward, backward, clip, optimizer and schedule: one whole step."""
        ...


class Policy(Trainable, Protocol):
    """The model in training, seen whole: the same verbs on the global batch."""

    @property
    def weights_version(self) -> int:
        """A number that is another one after whatever may have changed the weights."""
        ...

    def logprobs(self, batch: TrainBatch, reference: bool = False) -> Tensor:
        """Log-probabilities (nats, fp32, no gradient) aligned with `batch.token_ids_N`.

        Those of the weights that training began with, if `reference` is asked for. Shapes: [N].
        """
        ...

    def train_step(self, batch: TrainBatch, loss: Loss, *, step: int | None = None) -> StepStats:
        """One optimizer step on the whole batch.

        `step` is the run's step that it belongs to, from 1: all updates of one have its learning
        rate. None is the one after the last.
        """
        ...


class WeightSource(Protocol):
    """What has weights to give: a policy, or a checkpoint that nothing trains."""

    @property
    def weights_version(self) -> int:
        """A number that is another one after whatever may have changed the weights."""
        ...

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by Hugging Face name, one after the other."""
        ...


class Generator(Protocol):
    """An engine that completes prompts with a copy of the policy's weights."""

    def sync(self, policy: WeightSource) -> None:
        """Take the policy's weights of now; those that it has already are not sent again."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        samples: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in the order of the prompts.

        `samples` are the numbers of the samples of each prompt, by which their dice differ; None
        counts them here (`sample_numbers`).
        """
        ...

    def close(self) -> None:
        """Release processes and memory; safe to call twice."""
        ...


class Environment(Protocol):
    """What judges a rollout, and may reply to the model before.

    An environment inherits this class; `score` is all that one of single answers has to write.
    """

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One reward per rollout, in order; finite."""
        ...

    def reply(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """What each rollout goes on with, in order; None where it is complete."""
        return [None] * len(rollouts)

    def close(self) -> None:
        """Release processes; safe to call twice."""
        return


class RolloutSource(Protocol):
    """Where a step gets its rollouts from."""

    def next(self, step: int, journal: Journal, batch: int = 0) -> Drawn:
        """The rollouts that a step trains on; further batches of it, by their number.

        Steps are asked for in order, each once.
        """
        ...


class MetricSink(Protocol):
    """A place that metrics go to: console, file, TensorBoard, W&B, MLflow."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the reduced values of one step."""
        ...

    def close(self) -> None:
        """Write what is buffered; safe to call twice."""
        ...


class Journal(Protocol):
    """What hangs on every step, kept out of algorithms: metrics, timing, checkpoints, signals."""

    @property
    def first_step(self) -> int:
        """The first step still to do; more than 1 in a run that continues."""
        ...

    def steps(self) -> Iterator[int]:
        """The steps still to do; ends early at a signal or a time limit, after a checkpoint.

        What hangs on a step happens when the next one is asked for: its metrics are written, and
        the checkpoint that is due is saved.
        """
        ...

    @property
    def last_step(self) -> int:
        """The step that ends the run, unless something ends it before."""
        ...

    def stop(self, reason: str) -> None:
        """End the run before this step, which did nothing; ask for the next one after it."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time spent inside is booked under this name."""
        ...

    def beside(self, name: str, seconds: float) -> None:
        """Book seconds of work that went on while the step did something else."""
        ...

    def record(self, step: int, batch: TrainBatch, stats: StepStats) -> None:
        """Book a training step."""
        ...

    def record_validation(self, step: int, metrics: Metrics) -> None:
        """Book a validation; checkpoints may be ranked by its metrics, as `val:<name>`."""
        ...
