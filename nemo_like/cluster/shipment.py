"""One set of weights on its way from a policy to the engines."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from nemo_like.cluster.group import WorkerGroup
from nemo_like.cluster.policy import RemotePolicy
from nemo_like.errors import CheckpointError, WorkerError
from nemo_like.interfaces import WeightSource
from nemo_like.weight_sync.object_store import StoreSender
from nemo_like.weight_sync.transport import BUCKET_BYTES, Transport, buckets


@dataclass(frozen=True)
class Line:
    """A direct transport between a policy and these engines, in the order of their numbers.

    It holds while nobody at its ends is replaced: then another line is made.
    """

    transport: Transport
    policy: RemotePolicy
    engines: tuple[WorkerGroup, ...]


class Shipment:
    """The weights of one version: sent once to all engines, and again to one that missed them.

    `send` runs in one thread, and `into` in one of each engine; they return when the weights are
    there. By a line they are sent in step with the slowest engine; in the object store they stay,
    for engines to come.

    Args:
        version: The number of the sync.
        source: Whose weights they are.
        engines: The first of them makes references.
        line: How they travel; None is through the object store.
        is_met: Whether the two ends of the line have met before.
    """

    def __init__(
        self,
        version: int,
        source: WeightSource,
        engines: tuple[WorkerGroup, ...],
        *,
        line: Line | None,
        is_met: bool,
    ):
        self.version = version
        self.digest = ""
        self._source = source
        self._source_version = source.weights_version
        self._engines = engines
        self._line = line
        self._is_met = is_met
        self._address: Any = None
        self._parcels: list[list[Any]] = []
        self._received = dict.fromkeys(range(len(engines)), 0)
        self._stage = "opening"
        self._lost_an_engine = False
        self._changed = threading.Condition()
        self._resending = threading.Lock()

    def is_of(self, policy: WeightSource) -> bool:
        """Whether these are the weights that the policy has now."""
        return self._source is policy and self._source_version == policy.weights_version

    def send(self) -> None:
        """Sends everything; readers end with it, or where it breaks off.

        Raises:
            WorkerError: the policy, or the line, broke.
        """
        ended = "broken"
        try:
            with closing(self._outgoing()) as outgoing:
                for parcels in outgoing:
                    self._offer(parcels)
            ended = "whole"
        finally:
            self._note(stage=ended)

    def into(self, number: int) -> str:
        """The digest of what this engine took.

        Raises:
            WorkerError: the engine, or something between it and the policy, is broken.
        """
        engine, line = self._engines[number], self._line
        try:
            if line is not None and not self._is_met:
                with self._changed:
                    self._changed.wait_for(lambda: self._stage != "opening")
                receiver = line.transport.receiver(number, num_receivers=len(self._engines))
                engine.open_receiver(receiver, self._address)
            parcels, direct = self._incoming(number), line is not None
            return self._feed(engine, parcels, direct=direct)
        finally:
            with self._changed:
                self._lost_an_engine = self._lost_an_engine or engine.is_lost
                del self._received[number]
                self._changed.notify_all()

    def broke_with_an_engine(self) -> bool:
        """Whether an engine was lost over it; returns when everyone is through."""
        with self._changed:
            self._changed.wait_for(lambda: not self._received and self._is_over)
            return self._lost_an_engine

    def again_into(self, engine: WorkerGroup) -> str:
        """The digest of what an engine took through the object store, after all others.

        Raises:
            CheckpointError: nothing kept the weights, and the policy has gone on meanwhile.
        """
        self.broke_with_an_engine()
        with self._resending:
            kept = self._stage == "whole" and self._line is None
            if kept:
                return self._feed(engine, self._parcels)
            with closing(self._through_the_store()) as parcels:
                digest = self._feed(engine, self._unless_trained_on(parcels))
        if self.digest not in ("", digest):
            raise self._gone()
        return digest

    def _feed(
        self, engine: WorkerGroup, parcels: Iterable[list[Any]], *, direct: bool = False
    ) -> str:
        taken = engine.feed("load_weights", parcels, direct=direct, version=self.version)
        return str(taken[0])

    def _unless_trained_on(self, parcels: Iterable[list[Any]]) -> Iterator[list[Any]]:
        if not self.is_of(self._source):
            raise self._gone()
        yield from parcels

    def _gone(self) -> CheckpointError:
        return CheckpointError(
            f"an engine was lost, and the policy no longer has version {self.version} of the "
            "weights. With policy.generation.refit_transport=object_store they are kept"
        )

    def _outgoing(self) -> Generator[list[Any]]:
        if self._line is None:
            yield from self._through_the_store()
            return
        policy = self._line.policy
        if not self._is_met:
            address = policy.open_senders(self._line.transport, num_receivers=len(self._engines))
            self._note(stage="open", address=address)
            policy.meet_receivers()
        yield from policy.send_weights(direct=True)

    def _through_the_store(self) -> Generator[list[Any]]:
        if isinstance(self._source, RemotePolicy):
            yield from self._source.send_weights()
            return
        sender, put = StoreSender(), self._engines[0].put
        for bucket in buckets(self._source.export_weights(), BUCKET_BYTES):
            yield [put(sender.send(bucket))]

    def _offer(self, parcels: list[Any]) -> None:
        """Lets engines have it; what goes by a line must be there before the next is sent."""
        with self._changed:
            self._parcels.append(parcels)
            self._changed.notify_all()
            if self._line is not None:
                self._changed.wait_for(self._is_received)

    def _incoming(self, number: int) -> Iterator[list[Any]]:
        """All parcels, as they come; whoever asks for the next has received the last."""
        for place in count():
            with self._changed:
                self._received[number] = place
                self._changed.notify_all()
                self._changed.wait_for(partial(self._is_known, place))
                if self._stage == "broken":
                    raise WorkerError(f"version {self.version} of the weights broke off half-way")
                if place == len(self._parcels):
                    return
            yield self._parcels[place]

    @property
    def _is_over(self) -> bool:
        return self._stage in ("whole", "broken")

    def _is_known(self, place: int) -> bool:
        return self._is_over or place < len(self._parcels)

    def _is_received(self) -> bool:
        return min(self._received.values(), default=len(self._parcels)) == len(self._parcels)

    def _note(self, *, stage: str, address: Any = None) -> None:
        with self._changed:
            self._stage = stage
            self._address = address
            self._changed.notify_all()
