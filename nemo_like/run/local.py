"""One process, no Ray: the verbs of a `Policy` on a backend that lives here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from nemo_like.data.batching import Batching, shard, unshard
from nemo_like.interfaces import Loss, PolicyBackend
from nemo_like.types import PolicyFacts, StepStats, TrainBatch


class LocalPolicy:
    """A `Policy` of a single rank."""

    def __init__(self, backend: PolicyBackend, *, train: Batching, logprob: Batching) -> None:
        self._backend = backend
        self._train = train
        self._logprob = logprob
        self._num_changes = 0

    @property
    def weights_version(self) -> int:
        """How often the weights may have changed."""
        return self._num_changes

    def logprobs(self, batch: TrainBatch, reference: bool = False) -> Tensor:
        """Log-probabilities (nats, fp32, no gradient) aligned with `batch.token_ids_N`."""
        shards = shard(batch, 1, self._logprob)
        return unshard(shards, [self._backend.logprobs(shards[0], reference)])

    def train_step(self, batch: TrainBatch, loss: Loss, *, step: int | None = None) -> StepStats:
        """One optimizer step on the whole batch."""
        self._num_changes += 1
        return self._backend.train_step(shard(batch, 1, self._train)[0], loss, step=step)

    def begin(self, total_steps: int) -> PolicyFacts:
        """Lay the schedules over this many steps; what there is to know of the policy."""
        return self._backend.begin(total_steps)

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write the state; returns when it is written or (asynchronous) copied."""
        self._backend.save(folder, with_optimizer=with_optimizer)

    def save_finished(self) -> bool:
        """Whether the last save is written; raises what went wrong meanwhile."""
        return self._backend.save_finished()

    def load(self, folder: Path) -> None:
        """Take the state that `save` wrote."""
        self._num_changes += 1
        self._backend.load(folder)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by Hugging Face name, one after the other."""
        return self._backend.export_weights()

    def close(self) -> None:
        """Release the backend; safe to call twice."""
        self._backend.close()
