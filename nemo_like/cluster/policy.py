"""The model in training, spread over Ray workers: a `Policy` of one backend per rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_like.cluster.group import WorkerGroup
from nemo_like.cluster.placement import Placement, Seat
from nemo_like.data.batching import Batching, shard, unshard
from nemo_like.interfaces import Loss
from nemo_like.observability.metrics import reduce
from nemo_like.types import PolicyFacts, Shard, StepStats, TrainBatch
from nemo_like.weight_sync.object_store import StoreReceiver
from nemo_like.weight_sync.transport import Transport


class RemotePolicy:
    """A `Policy` whose ranks are the workers of a group, each of which owns a `PolicyBackend`.

    Peers of a data-parallel rank share one copy of its shard in the object store.
    """

    def __init__(
        self, group: WorkerGroup, placement: Placement, *, train: Batching, logprob: Batching
    ):
        self._group = group
        self._placement = placement
        self._leaders = placement.leaders()
        self._train = train
        self._logprob = logprob
        self._saves_since = 0.0
        self._num_changes = 0
        self._make_room: Callable[[], object] = lambda: None

    def share_gpus(self, make_room: Callable[[], object]) -> None:
        """From now on this is called before the policy computes: others lie on its GPUs too."""
        self._make_room = make_room

    def empty_cache(self) -> None:
        """Gives back what it keeps of its GPUs' memory without using it."""
        self._group.empty_cache()

    def seats(self) -> list[Seat]:
        """Where each rank has its process; returns when all have one."""
        return self._group.seats()

    @property
    def weights_version(self) -> int:
        """How often the weights may have changed."""
        return self._num_changes

    @property
    def placement(self) -> Placement:
        """Which ranks there are."""
        return self._placement

    @property
    def is_lost(self) -> bool:
        """Whether its processes were ended, because one of them died or did not answer."""
        return self._group.is_lost

    def wait_ready(self) -> None:
        """Returns when every rank has made its backend; until then the driver is free."""
        self._group.wait_ready()

    def begin(self, total_steps: int) -> PolicyFacts:
        """Lays the schedules over this many steps; the model, its parameters' owners, and where."""
        self._make_room()
        facts: PolicyFacts = self._group.call_all("begin", total_steps)[0]
        return facts

    def logprobs(self, batch: TrainBatch, reference: bool = False) -> Tensor:
        """Log-probabilities (nats, fp32, no gradient) aligned with `token_ids_N`. Shapes: [N]."""
        self._make_room()
        shards = shard(batch, self._placement.num_data_parallel, self._logprob)
        of_rank = self._call_sharded("logprobs", shards, reference)
        logprobs_N: Tensor = unshard(shards, [of_rank[rank] for rank in self._leaders])
        return logprobs_N

    def train_step(self, batch: TrainBatch, loss: Loss, *, step: int | None = None) -> StepStats:
        """One optimizer step on the whole batch.

        Metrics are reduced over the data-parallel ranks, by the reduction they carry; one that is
        the same on every rank has the reduction `last`. Phases are rank 0's, and `dispatch` is the
        rest of the wall time.
        """
        started = time.perf_counter()
        self._make_room()
        self._num_changes += 1
        shards = shard(batch, self._placement.num_data_parallel, self._train)
        of_rank: list[StepStats] = self._call_sharded("train_step", shards, loss, step=step)
        metrics = reduce(of_rank[rank].metrics for rank in self._leaders)
        phases = of_rank[0].phases
        dispatch = time.perf_counter() - started - sum(phases.values())
        return replace(of_rank[0], metrics=metrics, phases=phases | {"dispatch": dispatch})

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Every rank writes its part of model, optimizer and RNG state into `folder`."""
        self._saves_since = time.monotonic()
        self._group.call_all("save", folder.absolute(), with_optimizer=with_optimizer)

    def load(self, folder: Path) -> None:
        """Every rank takes its part of the state that `save` wrote, in whatever layout."""
        self._make_room()
        self._num_changes += 1
        self._group.call_all("load", folder.absolute())

    def save_finished(self) -> bool:
        """Whether every rank has written what its last `save` began; raises what went wrong.

        Raises:
            WorkerError: a rank is not done in the time that a call may take.
        """
        writing = [i for i, done in enumerate(self._group.call_all("save_finished")) if not done]
        if writing and time.monotonic() - self._saves_since > self._group.timeout_s:
            raise self._group.give_up(writing, "save")
        return not writing

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by Hugging Face name, on the CPU, one after the other."""
        receiver = StoreReceiver()
        for parcels in self.send_weights():
            yield from receiver.receive([self._group.get(parcels[0])])

    def open_senders(self, transport: Transport, *, num_receivers: int) -> Any:
        """Makes the policy's halves of a transport; the address at which receivers meet them."""
        return self._group.open_senders(transport, num_receivers=num_receivers)

    def meet_receivers(self) -> None:
        """Returns when all receivers are there."""
        self._group.meet_receivers()

    def send_weights(self, *, direct: bool = False) -> Iterator[list[Any]]:
        """References to the parcels of each bucket, from every rank.

        They hold the weights, which workers resolve without a copy in the driver; or weights go
        directly, by the halves that are open.
        """
        return self._group.stream("export_weights", direct=direct)

    def close(self) -> None:
        """Ends the workers; safe to call twice."""
        self._group.close()

    def _call_sharded(
        self, method: str, shards: Sequence[Shard], *args: Any, **kwargs: Any
    ) -> list[Any]:
        self._group.wait_ready()
        refs = [self._group.put(part) for part in shards]
        shared = tuple(self._group.put(arg) for arg in args)
        places = self._placement.ranks
        of_rank = [(refs[place.data], *shared) for place in places]
        return self._group.call_each(method, of_rank, **kwargs)
