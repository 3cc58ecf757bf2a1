"""Rollout engines in Ray workers: a `Generator` whose engines may die."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import accumulate
from typing import Any, TypeVar

from nemo_like.cluster.group import CHUNK_BYTES, WorkerGroup
from nemo_like.cluster.policy import RemotePolicy
from nemo_like.cluster.wire import chunked, to_wire
from nemo_like.errors import CheckpointError, WorkerError
from nemo_like.interfaces import WeightSource
from nemo_like.types import Prompt, Rollout, SamplingParams, sample_numbers

T = TypeVar("T")


class RemoteGenerator:
    """A `Generator` over engines; each has all weights and a share of the samples.

    An engine has `load_weights(tensors, version=...)`, which returns the digest of what came,
    `generate(prompts, sampling, sample_numbers)`, and `close()`.

    An engine whose process dies, or does not answer in time, is replaced during the call: the new
    one gets the weights of the last sync, which are kept in the object store, and does the call
    again. Rollouts do not depend on who draws them, so the result is that of an undisturbed run.
    If the new one is lost in the same call, that is an error.

    Args:
        start_engine: A group of one worker, which is one engine, by its number.
        num_engines: How many there are.
        say: Told when an engine is lost, and when another has taken its place.
    """

    def __init__(
        self,
        start_engine: Callable[[int], WorkerGroup],
        *,
        num_engines: int,
        say: Callable[[str], object],
    ):
        self._start_engine = start_engine
        self._say = say
        self._engines = [start_engine(number) for number in range(num_engines)]
        self._threads = ThreadPoolExecutor(num_engines, thread_name_prefix="engine")
        self._weights: _Weights | None = None
        self._version = 0
        self._closed = threading.Event()

    def sync(self, policy: WeightSource) -> None:
        """Streams the policy's weights of now into every engine, in bounded chunks.

        Raises:
            CheckpointError: they are not the weights of the engines' model, or not what was sent.
        """
        for engine in self._engines:
            engine.wait_ready()
        self._weights = None
        self._version += 1
        weights = _Weights(self._version)
        loads = [
            self._threads.submit(self._load, number, weights)
            for number in range(len(self._engines))
        ]
        try:
            weights.fill(self._chunks(policy))
        finally:
            wait(loads)
        digests = {load.result() for load in loads}
        if len(digests) > 1:
            raise CheckpointError(
                f"the engines took version {weights.version} of the weights for different ones: "
                f"{', '.join(sorted(digests))}"
            )
        self._weights = weights

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        samples: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in the order of the prompts.

        Raises:
            CheckpointError: the last sync did not succeed, or an engine holds other weights.
        """
        weights = self._weights
        if weights is None:
            raise CheckpointError(
                "the rollout engines hold no complete weights: a sync has to succeed first"
            )
        numbers = sample_numbers(prompts) if samples is None else samples
        work = [len(prompt.token_ids) + sampling.max_new_tokens for prompt in prompts]
        parts: list[Future[list[Rollout]]] = []
        for engine, rows in enumerate(shares(work, len(self._engines))):
            part = slice(rows.start, rows.stop)
            call = (prompts[part], sampling, numbers[part])
            if rows:
                parts.append(self._threads.submit(self._draw, engine, weights, call))
        wait(parts)
        rollouts = [rollout for part in parts for rollout in part.result()]
        if stale := {r.weights_version for r in rollouts} - {weights.version}:
            raise CheckpointError(
                f"an engine drew with version {stale.pop()} of the weights, and {weights.version} "
                "is the one that was sent"
            )
        return rollouts

    def close(self) -> None:
        """Ends the engines; safe to call twice."""
        self._closed.set()
        for engine in self._engines:
            engine.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _chunks(self, policy: WeightSource) -> Iterable[Any]:
        if isinstance(policy, RemotePolicy):
            return policy.export_chunks()
        tensors = chunked(policy.export_weights(), CHUNK_BYTES)
        return (self._engines[0].put(to_wire(chunk)) for chunk in tensors)

    def _load(self, number: int, weights: _Weights) -> str:
        return self._with_replacement(number, lambda engine: weights.into(engine))

    def _draw(self, number: int, weights: _Weights, call: tuple[Any, ...]) -> list[Rollout]:
        def draw(engine: WorkerGroup) -> list[Rollout]:
            rollouts: list[Rollout] = engine.call_each("generate", [call])[0]
            return rollouts

        return self._with_replacement(number, draw, before=weights.into)

    def _with_replacement(
        self,
        number: int,
        do: Callable[[WorkerGroup], T],
        before: Callable[[WorkerGroup], object] = lambda engine: None,
    ) -> T:
        """What `do` makes of an engine; of another one, after `before`, if that is lost over it."""
        engine = self._engines[number]
        try:
            return do(engine)
        except WorkerError as error:
            if not engine.is_lost or self._closed.is_set():
                raise
            self._say(f"{str(error).splitlines()[0]}. Another engine takes its place")
        lost_at = time.monotonic()
        engine = self._engines[number] = self._start_engine(number)
        before(engine)
        value = do(engine)
        self._say(
            f"the engine in its place has caught up, {time.monotonic() - lost_at:.0f} s later"
        )
        return value


class _Weights:
    """What one sync sent: references to chunks, read while they arrive, and again later."""

    def __init__(self, version: int):
        self.version = version
        self._chunks: list[Any] = []
        self._is_whole = False
        self._changed = threading.Condition()

    def fill(self, chunks: Iterable[Any]) -> None:
        """Takes all chunks; readers end with them, or where they break off."""
        try:
            for chunk in chunks:
                with self._changed:
                    self._chunks.append(chunk)
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._is_whole = True
                self._changed.notify_all()

    def into(self, engine: WorkerGroup) -> str:
        """The digest of what an engine took."""
        digest: str = engine.feed("load_weights", self._read(), version=self.version)[0]
        return digest

    def _read(self) -> Iterator[Any]:
        place = 0
        while self._has(place):
            yield self._chunks[place]
            place += 1

    def _has(self, place: int) -> bool:
        """Whether there is a chunk at this place, as soon as that is known."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_whole or place < len(self._chunks))
            return place < len(self._chunks)


def shares(work: Sequence[int], num_parts: int) -> list[range]:
    """Consecutive places whose work is about the same in each part; a part may be empty.

    Consecutive, so most samples of a prompt stay together and share its prefix.
    """
    total = sum(work)
    part_of_place = [
        int((end - own / 2) * num_parts / total)
        for end, own in zip(accumulate(work), work, strict=True)
    ]
    starts = [sum(part < number for part in part_of_place) for number in range(num_parts + 1)]
    return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]
