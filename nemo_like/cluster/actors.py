"""The one class that runs in worker processes. It owns an object and forwards named calls to it."""

from __future__ import annotations

import dataclasses
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from nemo_like.cluster import stacks
from nemo_like.cluster.failures import Failure, WorkerIdentity

T = TypeVar("T")
Factory = Callable[[], Any]
"""Makes a worker's object. Picklable: a frozen dataclass whose `__call__` imports heavy things."""


class Worker:
    """A process's object, made from a factory, and calls to it by name.

    A call returns its value or a `Failure`, never raises: so every exception reaches the driver
    readable, whether its class can be pickled or not.
    """

    def __init__(self, identity: WorkerIdentity):
        self._identity = identity
        self._object: Any = None
        self._stream: Iterator[list[Any]] = iter(())
        self._feed: _Feed | None = None
        identity.log_file.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(identity.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        stacks.listen()

    def hello(self) -> tuple[WorkerIdentity, int]:
        """Who this is by now, and a port that is free here (rank 0's is used to meet at)."""
        import ray  # long imported here: this is a Ray worker

        node = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._identity = dataclasses.replace(self._identity, node=node, pid=os.getpid())
        with socket.socket() as probe:
            probe.bind(("", 0))
            return self._identity, probe.getsockname()[1]

    def make(self, factory: Factory, env: dict[str, str]) -> Failure | None:
        """Makes the object, with torch.distributed's variables in the environment."""

        def run() -> None:
            os.environ.update(env)
            self._object = factory()

        return self._guarded("start", run)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The value of a method of the object, or a `Failure`."""
        return self._guarded(method, lambda: getattr(self._object, method)(*args, **kwargs))

    def open_stream(self, method: str, max_bytes: int) -> Failure | None:
        """Starts to iterate over named tensors, which `next_chunk` then takes."""

        def run() -> None:
            from nemo_like.cluster.wire import chunked

            self._stream = chunked(getattr(self._object, method)(), max_bytes)

        return self._guarded(method, run)

    def next_chunk(self, method: str, keep: bool) -> tuple[int | Failure, Any]:
        """The number of tensors taken from the stream (0 at its end), and, if kept, their bytes."""

        def run() -> tuple[int, Any]:
            from nemo_like.cluster.wire import to_wire

            tensors: list[Any] = next(self._stream, [])
            return len(tensors), to_wire(tensors) if keep else None

        outcome = self._guarded(method, run)
        return (outcome, None) if isinstance(outcome, Failure) else outcome

    def open_feed(self, method: str, **kwargs: Any) -> Failure | None:
        """Starts `method(iterator, ...)` in a thread; the iterator yields what `feed` brings.

        A feed that was broken off before is ended first: its iterator raises.
        """

        def run() -> None:
            if self._feed is not None:
                self._feed.abandon()
            self._feed = _Feed(lambda tensors: getattr(self._object, method)(tensors, **kwargs))

        return self._guarded(method, run)

    def feed(self, method: str, chunk: Any) -> Failure | None:
        """Hands one chunk to the running method; returns when the method has asked for it."""

        def run() -> None:
            from nemo_like.cluster.wire import from_wire

            assert self._feed is not None, "feed before open_feed"
            self._feed.put(from_wire(chunk))

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
