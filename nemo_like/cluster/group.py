"""A group of workers: called as one, and failing as one, in bounded time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_like.cluster import memory
from nemo_like.cluster.actors import Factory, Worker
from nemo_like.cluster.failures import Failure, WorkerIdentity, died, hang_error, to_error
from nemo_like.cluster.placement import Placement, RankPlace, Seat, check_fits, worker_env
from nemo_like.cluster.reservation import Reservation
from nemo_like.cluster.runtime import RayCluster
from nemo_like.errors import NemoLikeError, WorkerError
from nemo_like.weight_sync.transport import BUCKET_BYTES, Receiver, Transport

POLL_S = 0.5
"""How often a wait comes back to look at the clock (and lets Python handle signals)."""
GRACE_S = 1.0
"""How long others may still answer after the first failure: a cause may follow its symptom."""
START_S = 1800.0
"""How long a start may take at least: a first start downloads and loads a model."""
CLOSE_S = 10.0
"""How long objects may take to close before their processes are ended."""


@dataclass(frozen=True)
class GroupConfig:
    """What a group is made from; `machine` is Ray's id of the only one that will do, if any."""

    name: str
    placement: Placement
    factory: Factory
    log_dir: Path
    timeout_s: float
    env_vars: Mapping[str, str] = field(default_factory=dict)
    bucket_bytes: int = BUCKET_BYTES
    machine: str | None = None


class WorkerGroup:
    """One actor per rank of a placement.

    `start` returns at once, `wait_ready` (or the first call) waits. A call that every worker
    answered leaves the group usable, even if they all raised; if some did not answer, all processes
    are ended, because they may sit in a collective for ever.
    """

    def __init__(self, cluster: RayCluster, config: GroupConfig):
        self._cluster = cluster
        self._config = config
        self._identities = [self._identity(place) for place in config.placement.ranks]
        self._actors: list[Any] = []
        self._reservation: Reservation | None = None
        self._seats: list[Seat] = []
        self._started: Future[list[Any]] | None = None
        self._ready = False
        self._broken: NemoLikeError | None = None
        self._closing = threading.Event()
        self._host = memory.Host.now()
        self._turn = threading.Lock()

    def start(self) -> None:
        """Begins to start all workers; a second call does nothing."""
        if self._started is None:
            self._cluster.start()
            executor = ThreadPoolExecutor(1, thread_name_prefix=f"start-{self._config.name}")
            self._started = executor.submit(self._start)
            executor.shutdown(wait=False)

    @property
    def timeout_s(self) -> float:
        """How long a call may take."""
        return self._config.timeout_s

    @property
    def is_lost(self) -> bool:
        """Whether its processes were ended, because one of them died or did not answer."""
        return self._broken is not None

    def wait_ready(self) -> None:
        """Returns when every worker has made its object.

        Raises:
            NemoLikeError: what went wrong at the start, named like the failure of any call.
        """
        if self._broken is not None and not self._ready:
            raise self._broken
        if self._broken is not None:
            raise WorkerError(f"the {self._config.name} workers were ended before: {self._broken}")
        self.start()
        if not self._ready:
            assert self._started is not None
            # Whatever a start waits for has a deadline of its own.
            self._gather(self._started.result(), "start")
            self._ready = True

    def seats(self) -> list[Seat]:
        """Where each rank has its process; returns when all have one, made their objects or not."""
        self.start()
        assert self._started is not None
        self._started.result()
        return self._seats

    def call_all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """The values of one call on every rank; references among the arguments resolve there."""
        self.wait_ready()
        with self._alone(method):
            refs = [actor.call.remote(method, *args, **kwargs) for actor in self._actors]
            return self._gather(refs, method)

    def call_each(
        self, method: str, args_of_rank: Sequence[tuple[Any, ...]], **kwargs: Any
    ) -> list[Any]:
        """The values of one call with arguments of their own on every rank, and some shared."""
        self.wait_ready()
        pairs = zip(self._actors, args_of_rank, strict=True)
        with self._alone(method):
            refs = [actor.call.remote(method, *args, **kwargs) for actor, args in pairs]
            return self._gather(refs, method)

    def put(self, value: Any) -> Any:
        """A reference to a value, so that ranks that share it do not each get a copy."""
        self.wait_ready()
        return self._cluster.ray.put(value)

    def get(self, ref: Any) -> Any:
        """The value behind a reference that rank 0 made."""
        exceptions = self._cluster.ray.exceptions
        try:
            return self._cluster.ray.get(ref, timeout=self._config.timeout_s)
        except exceptions.GetTimeoutError as exc:
            raise self.give_up([0], "transfer") from exc
        except exceptions.RayError as exc:
            raise self._break(to_error([died(self._identities[0], "transfer", str(exc))])) from exc

    def empty_cache(self) -> None:
        """Every rank gives back what it keeps of its GPU's memory without using it."""
        self._tell("empty_cache")

    def open_senders(self, transport: Transport, *, num_receivers: int) -> Any:
        """Every rank makes its half of a transport, in place of any before; rank 0's address."""
        return self._tell("open_sender", transport, num_receivers)[0]

    def meet_receivers(self) -> None:
        """Returns when every rank's half has met those that it sends to."""
        self._tell("meet_receivers")

    def open_receiver(self, receiver: Receiver, address: Any) -> None:
        """Every rank takes this half of a transport, and meets the sender."""
        self._tell("open_receiver", receiver, address)

    def stream(self, method: str, *, direct: bool = False) -> Iterator[list[Any]]:
        """The parcels of the named tensors that a method yields, by the store or the open senders.

        Of each bucket there is a list of references, one per rank. All ranks iterate, because
        gathering a tensor is a collective. The next bucket is sent while the caller works with the
        last: at most two exist.
        """
        with self._alone(method):
            self._tell("open_stream", method, self._config.bucket_bytes, direct)
            ahead = self._request_parcel(method)
            while True:
                counts = self._gather([count for count, _ in ahead], method)
                parcels = [parcel for _, parcel in ahead]
                if not counts[0]:
                    self._tell("finish_sending")
                    return
                ahead = self._request_parcel(method)
                yield parcels

    def feed(
        self, method: str, parcels: Iterable[list[Any]], *, direct: bool = False, **kwargs: Any
    ) -> list[Any]:
        """The values of `method(iterator of named tensors, ...)` on every rank, fed by bucket.

        The next parcels are asked for when the last were received.
        """
        self._tell("open_feed", method, direct, kwargs)
        for bucket in parcels:
            self._gather([actor.feed.remote(method, *bucket) for actor in self._actors], method)
        return self._gather([actor.close_feed.remote(method) for actor in self._actors], method)

    def give_up(self, ranks: Sequence[int], phase: str) -> WorkerError:
        """The error of ranks that do not answer; the stacks of all are written, its own end."""
        limit_s, key = self._config.timeout_s, "cluster.worker_timeout_s"
        limit = f"{key}={limit_s:g}"
        if phase == "start":
            limit = f"{self._start_limit():g} s (the longer of {START_S:g} and {limit})"
        file = self._config.log_dir / f"stacks_{self._config.name}_{phase}.txt"
        silent = [self._identities[rank] for rank in ranks]
        self._cluster.write_stacks(file, self._identities)
        error = hang_error(silent, phase, limit, str(file.absolute()))
        self._break(error)
        return error

    def close(self) -> None:
        """Closes the objects and ends the processes; safe to call twice, and after any failure."""
        if self._started is None:
            return
        started, self._started = self._started, None
        self._closing.set()
        wait([started], CLOSE_S)
        if started.done() and started.exception() is None and self._ready and self._broken is None:
            ray = self._cluster.ray
            ray.wait(
                [actor.call.remote("close") for actor in self._actors],
                num_returns=len(self._actors),
                timeout=CLOSE_S,
            )
        self._kill()
        self._broken = self._broken or WorkerError(f"the {self._config.name} workers are closed")

    def _identity(self, place: RankPlace) -> WorkerIdentity:
        name = self._config.name
        file = self._config.log_dir / f"{name}_rank{place.rank}.log"
        world = self._config.placement.world_size
        return WorkerIdentity(name, place.rank, world, file.absolute())

    def _start(self) -> list[Any]:
        """Starts the processes, lets them meet, and begins to make their objects."""
        ray, placement = self._cluster.ray, self._config.placement
        check_fits(placement, self._cluster.nodes())
        self._reservation = Reservation(ray, placement, machine=self._config.machine)
        self._reservation.wait(self._config.name, self._refuse_closing)
        actor_class = ray.remote(Worker)
        env = worker_env(placement, self._config.env_vars)
        self._actors = [
            actor_class.options(
                runtime_env={"env_vars": env}, **self._reservation.options(place)
            ).remote(identity)
            for place, identity in zip(placement.ranks, self._identities, strict=True)
        ]
        hellos = self._gather([actor.hello.remote() for actor in self._actors], "start")
        self._identities = [hello.identity for hello in hellos]
        self._seats = [hello.seat for hello in hellos]
        self._cluster.watch(self._config.name, self._identities)
        first = hellos[0]
        master = ("127.0.0.1" if placement.num_nodes == 1 else first.identity.node, first.port)
        return [
            actor.make.remote(self._config.factory, self._meeting_env(place, *master))
            for place, actor in zip(placement.ranks, self._actors, strict=True)
        ]

    def _refuse_closing(self) -> None:
        if self._closing.is_set():
            raise WorkerError(f"the {self._config.name} workers were closed")

    def _start_limit(self) -> float:
        return max(START_S, self._config.timeout_s)

    def _meeting_env(self, place: RankPlace, address: str, port: int) -> dict[str, str]:
        placement = self._config.placement
        return {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "RANK": str(place.rank),
            "WORLD_SIZE": str(placement.world_size),
            "LOCAL_RANK": str(place.local_rank),
            "LOCAL_WORLD_SIZE": str(placement.workers_per_node),
        }

    @contextmanager
    def _alone(self, phase: str) -> Iterator[None]:
        """Inside, no other thread has a call: ranks would meet in collectives of different ones."""
        if not self._turn.acquire(timeout=self._config.timeout_s):
            raise WorkerError(
                f"the {self._config.name} workers did not come to {phase} within "
                f"cluster.worker_timeout_s={self._config.timeout_s:g}: another call did not end"
            )
        try:
            yield
        finally:
            self._turn.release()

    def _tell(self, verb: str, *args: Any) -> list[Any]:
        """The answers of all workers themselves, not of their objects."""
        self.wait_ready()
        return self._gather([getattr(actor, verb).remote(*args) for actor in self._actors], verb)

    def _request_parcel(self, method: str) -> list[Any]:
        return [actor.next_parcel.options(num_returns=2).remote(method) for actor in self._actors]

    def _gather(self, refs: Sequence[Any], phase: str) -> list[Any]:
        """The values of these references, one per rank; a failure ends the wait after a grace."""
        pending = {ref: rank for rank, ref in enumerate(refs)}
        values: list[Any] = [None] * len(refs)
        failures: list[Failure] = []
        limit = self._start_limit() if phase == "start" else self._config.timeout_s
        deadline = time.monotonic() + limit
        while pending and time.monotonic() < deadline:
            self._refuse_closing()
            done, _ = self._cluster.ray.wait(list(pending), num_returns=1, timeout=POLL_S)
            for ref in done:
                rank = pending.pop(ref)
                values[rank] = self._outcome(ref, rank, phase)
                if isinstance(values[rank], Failure):
                    failures.append(values[rank])
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            error = to_error(failures)
        elif pending:
            raise self.give_up(list(pending.values()), phase)
        else:
            return values
        unusable = pending or any(f.died for f in failures) or phase == "start"
        raise self._break(error) if unusable else error

    def _outcome(self, ref: Any, rank: int, phase: str) -> Any:
        exceptions = self._cluster.ray.exceptions
        try:
            return self._cluster.ray.get(ref, timeout=self._config.timeout_s)
        except exceptions.GetTimeoutError as exc:
            raise self.give_up([rank], phase) from exc
        except exceptions.RayTaskError as exc:  # arguments or value could not be unpickled
            return Failure(self._identities[rank], phase, f"the call did not go through: {exc}")
        except exceptions.RayActorError as exc:
            # After the start Ray only repeats, in many words, that the process is gone.
            return self._died(rank, phase, str(exc), tell=phase == "start")
        except exceptions.RayError as exc:
            return self._died(rank, phase, str(exc), tell=True)

    def _died(self, rank: int, phase: str, said: str, *, tell: bool) -> Failure:
        """The record of a process that is gone, of which Ray has `said` something."""
        lack = memory.of_the_dead(
            phase, self._config.name, said=said, before=self._host, now=memory.Host.now()
        )
        return died(self._identities[rank], phase, f"{lack}. Ray says: {said}" if tell else lack)

    def _break(self, error: NemoLikeError) -> NemoLikeError:
        self._broken = error
        self._kill()
        return error

    def _kill(self) -> None:
        ray = self._cluster.ray
        self._cluster.watch(self._config.name, ())
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None
