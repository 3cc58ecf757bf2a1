"""The one class that runs in worker processes. It owns an object and forwards named calls to it."""

from __future__ import annotations

import dataclasses
import gc
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from nemo_like.cluster import stacks
from nemo_like.cluster.failures import Failure, WorkerIdentity
from nemo_like.cluster.placement import Seat

T = TypeVar("T")
Factory = Callable[[], Any]
"""Makes a worker's object. Picklable: a frozen dataclass whose `__call__` imports heavy things."""


@dataclasses.dataclass(frozen=True)
class Hello:
    """Who a worker is by now, where it is, and a port that is free there."""

    identity: WorkerIdentity
    seat: Seat
    port: int


class Worker:
    """A process's object, made from a factory, and calls to it by name.

    A call returns its value or a `Failure`, never raises: so every exception reaches the driver
    readable, whether its class can be pickled or not.
    """

    def __init__(self, identity: WorkerIdentity):
        self._identity = identity
        self._object: Any = None
        self._stream: Iterator[list[Any]] = iter(())
        self._line_out: Any = None
        self._line_in: Any = None
        self._sender: Any = None
        self._receiver: Any = None
        self._feed: _Feed | None = None
        identity.log_file.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(identity.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        stacks.listen()

    def hello(self) -> Hello:
        """Who and where this is; rank 0's port is used to meet at."""
        import ray  # long imported here: this is a Ray worker

        node = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._identity = dataclasses.replace(self._identity, node=node, pid=os.getpid())
        machine = str(ray.get_runtime_context().get_node_id())
        seat = Seat(machine, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        with socket.socket() as probe:
            probe.bind(("", 0))
            return Hello(self._identity, seat, probe.getsockname()[1])

    def make(self, factory: Factory, env: dict[str, str]) -> Failure | None:
        """Makes the object, with torch.distributed's variables in the environment."""

        def run() -> None:
            os.environ.update(env)
            self._object = factory()

        return self._guarded("start", run)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The value of a method of the object, or a `Failure`."""
        return self._guarded(method, lambda: getattr(self._object, method)(*args, **kwargs))

    def empty_cache(self) -> Failure | None:
        """Gives back what is kept of the GPU's memory without use: others may live there too."""

        def run() -> None:
            import torch

            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()

        return self._guarded("empty_cache", run)

    def open_sender(self, transport: Any, num_receivers: int) -> Any:
        """Makes this rank's half of a transport, if it has one; its address."""

        def run() -> Any:
            if self._line_out is not None:
                self._line_out.close()
            identity = self._identity
            self._line_out = transport.sender(
                identity.rank, host=identity.node, num_receivers=num_receivers
            )
            return None if self._line_out is None else self._line_out.address

        return self._guarded("open_sender", run)

    def meet_receivers(self) -> Failure | None:
        """Returns when those that this rank sends to are there."""

        def run() -> None:
            if self._line_out is not None:
                self._line_out.meet()

        return self._guarded("meet_receivers", run)

    def open_receiver(self, receiver: Any, address: Any) -> Failure | None:
        """Takes this half of a transport, in place of any other, and meets its sender."""

        def run() -> None:
            if self._line_in is not None:
                self._line_in.close()
            self._line_in = receiver
            receiver.meet(address)

        return self._guarded("open_receiver", run)

    def open_stream(self, method: str, max_bytes: int, direct: bool) -> Failure | None:
        """Starts to iterate over named tensors, which `next_parcel` then sends.

        Rank 0 puts them into the object store, unless they go by the senders that are open.
        """

        def run() -> None:
            from nemo_like.weight_sync.object_store import StoreSender
            from nemo_like.weight_sync.transport import buckets

            store = StoreSender() if self._identity.rank == 0 else None
            self._sender = self._line_out if direct else store
            self._stream = buckets(getattr(self._object, method)(), max_bytes)

        return self._guarded(method, run)

    def next_parcel(self, method: str) -> tuple[int | Failure, Any]:
        """The number of tensors taken from the stream (0 at its end), and the parcel, if any."""

        def run() -> tuple[int, Any]:
            bucket = next(self._stream, [])
            sends = bucket and self._sender is not None
            return len(bucket), self._sender.send(bucket) if sends else None

        outcome = self._guarded(method, run)
        return (outcome, None) if isinstance(outcome, Failure) else outcome

    def finish_sending(self) -> Failure | None:
        """Gives back the memory of what was sent, now that all have it."""

        def run() -> None:
            if self._sender is not None:
                self._sender.finish()

        return self._guarded("finish_sending", run) or self.empty_cache()

    def open_feed(self, method: str, direct: bool, kwargs: dict[str, Any]) -> Failure | None:
        """Starts `method(iterator, ...)` in a thread; the iterator yields what `feed` brings.

        That comes from the object store, or by the receiver that is open. A feed that was broken
        off before is ended first: its iterator raises.
        """

        def run() -> None:
            from nemo_like.weight_sync.object_store import StoreReceiver

            self._receiver = self._line_in if direct else StoreReceiver()
            if self._feed is not None:
                self._feed.abandon()
            self._feed = _Feed(lambda tensors: getattr(self._object, method)(tensors, **kwargs))

        return self._guarded(method, run)

    def feed(self, method: str, *parcels: Any) -> Failure | None:
        """Receives one bucket; returns when the running method has asked for the one before."""

        def run() -> None:
            assert self._feed is not None, "feed before open_feed"
            self._feed.put(self._receiver.receive(parcels))

        return self._guarded(method, run)

    def close_feed(self, method: str) -> Any:
        """Ends the iterator, and returns the method's value."""

        def run() -> Any:
            assert self._feed is not None, "close_feed before open_feed"
            feed, self._feed = self._feed, None
            return feed.finish()

        return self._guarded(method, run)

    def _guarded(self, phase: str, run: Callable[[], T]) -> T | Failure:
        try:
            return run()
        except Exception as exception:
            return Failure.of(exception, self._identity, phase)


class _Feed:
    """A method that runs in a thread, and the iterator it pulls from, filled one item ahead."""

    def __init__(self, consume: Callable[[Iterator[Any]], Any]):
        self._items: queue.Queue[list[Any] | None] = queue.Queue(maxsize=1)
        self._abandoned = False
        self._done = threading.Event()
        self._value: Any = None
        self._exception: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(consume,), daemon=True)
        self._thread.start()

    def put(self, items: list[Any] | None) -> None:
        """Waits until there is room; raises what the method raised, if it did."""
        while not self._done.is_set():
            try:
                return self._items.put(items, timeout=0.05)
            except queue.Full:
                continue
        if self._exception is not None:
            raise self._exception

    def finish(self) -> Any:
        """The method's value."""
        self.put(None)
        self._thread.join()
        if self._exception is not None:
            raise self._exception
        return self._value

    def abandon(self) -> None:
        """Makes the iterator raise, and returns when the method has ended."""
        self._abandoned = True
        with suppress(Exception):  # the method's own, which nobody asks for any more
            self.finish()

    def _run(self, consume: Callable[[Iterator[Any]], Any]) -> None:
        try:
            self._value = consume(self._iterate())
        except BaseException as exception:  # handed to the owner, which raises it
            self._exception = exception
        finally:
            self._done.set()

    def _iterate(self) -> Iterator[Any]:
        while (items := self._items.get()) is not None:
            yield from items
        if self._abandoned:
            raise ConnectionError("the sender broke off")
