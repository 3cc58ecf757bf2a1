"""Rollout engines in Ray workers: a `Generator` whose engines may die."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import accumulate
from typing import Any, TypeVar

from nemo_like.cluster.group import WorkerGroup
from nemo_like.cluster.policy import RemotePolicy
from nemo_like.cluster.shipment import Line, Shipment
from nemo_like.errors import CheckpointError, WorkerError
from nemo_like.interfaces import WeightSource
from nemo_like.types import Prompt, Rollout, SamplingParams, sample_numbers
from nemo_like.weight_sync.transport import Transport

T = TypeVar("T")


class RemoteGenerator:
    """A `Generator` over engines; each has all weights and a share of the samples.

    An engine has `load_weights(tensors, version=...)`, which returns the digest of what came,
    `generate(prompts, sampling, sample_numbers)`, and `close()`.

    An engine whose process dies, or does not answer in time, is replaced during the call: the new
    one gets the weights of the last sync and does the call again. Those that went through the
    object store are kept there; others the policy sends again, if it still has them. Rollouts do
    not depend on who draws them, so the result is that of an undisturbed run. If the new one is
    lost in the same call, that is an error.

    Args:
        start_engine: A group of one worker, which is one engine, by its number.
        num_engines: How many there are.
        say: Told when an engine is lost, and when another has taken its place.
        transport: A direct one for the weights of a policy in workers; None is the object store.
        shares_gpus: The engines lie on the policy's GPUs, and have `sleep()`: they are born asleep,
            `load_weights` wakes them, and `sleep` here gives the policy their memory.
    """

    def __init__(
        self,
        start_engine: Callable[[int], WorkerGroup],
        *,
        num_engines: int,
        say: Callable[[str], object],
        transport: Transport | None = None,
        shares_gpus: bool = False,
    ):
        self._start_engine = start_engine
        self._say = say
        self._transport = transport
        self._engines = [start_engine(number) for number in range(num_engines)]
        self._threads = ThreadPoolExecutor(num_engines, thread_name_prefix="engine")
        self._weights: Shipment | None = None
        self._met: Line | None = None
        self._version = 0
        self._shares_gpus = shares_gpus
        self._is_awake = False
        self._closed = threading.Event()

    def sync(self, policy: WeightSource) -> None:
        """Streams the policy's weights of now into every engine, in bounded buckets.

        Weights that have not changed since the last sync are not sent again.

        Raises:
            CheckpointError: they are not the weights of the engines' model, or not what was sent.
            WorkerError: the policy, or what is between it and the engines, broke.
        """
        if self._weights is not None and self._weights.is_of(policy):
            return
        for engine in self._engines:
            engine.wait_ready()
        self._weights = None
        self._version += 1
        self._is_awake = self._shares_gpus
        if self._shares_gpus and isinstance(policy, RemotePolicy):
            policy.empty_cache()
        line = self._line_from(policy)
        weights = Shipment(
            self._version, policy, tuple(self._engines), line=line, is_met=line == self._met
        )
        self._met = None
        loads = [
            self._threads.submit(self._load, number, weights)
            for number in range(len(self._engines))
        ]
        broken: list[BaseException] = []
        try:
            weights.send()
        except WorkerError as error:  # if an engine was lost, all have the weights nevertheless
            broken.append(error)
        finally:
            wait(loads)
        failures = [failure for load in loads if (failure := load.exception())]
        if failures:
            # What an engine refuses is no broken line, but it may break one.
            raise min([*broken, *failures], key=lambda failure: isinstance(failure, WorkerError))
        digests = {load.result() for load in loads}
        if len(digests) > 1:
            raise CheckpointError(
                f"the engines took version {weights.version} of the weights for different ones: "
                f"{', '.join(sorted(digests))}"
            )
        (weights.digest,) = digests
        self._weights = weights
        if not weights.broke_with_an_engine():
            self._met = line

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

    def sleep(self) -> None:
        """Frees the memory of engines on the policy's GPUs; their weights are gone with it.

        Raises:
            WorkerError: an engine does not sleep, and was not lost either.
        """
        for engine in self._engines:
            engine.wait_ready()  # until then it has the memory, and measures it
        if not self._is_awake:
            return
        self._weights = None  # so that the next sync sends them, changed or not
        self._is_awake = False
        naps = [
            self._threads.submit(self._put_to_sleep, number) for number in range(len(self._engines))
        ]
        wait(naps)
        for nap in naps:
            nap.result()

    def close(self) -> None:
        """Ends the engines; safe to call twice."""
        self._closed.set()
        for engine in self._engines:
            engine.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _line_from(self, policy: WeightSource) -> Line | None:
        if self._transport is None or not isinstance(policy, RemotePolicy):
            return None
        return Line(self._transport, policy, tuple(self._engines))

    def _put_to_sleep(self, number: int) -> None:
        engine = self._engines[number]
        try:
            engine.call_all("sleep")
        except WorkerError as error:
            if not engine.is_lost or self._closed.is_set():
                raise
            self._replaced(number, error, WorkerGroup.wait_ready)

    def _load(self, number: int, weights: Shipment) -> str:
        """The digest of what an engine took: at first, or after one was lost over it."""
        try:
            return weights.into(number)
        except WorkerError as error:
            engine = self._engines[number]
            if self._closed.is_set():
                raise
            if engine.is_lost:
                return self._replaced(number, error, weights.again_into)
            if not weights.broke_with_an_engine():
                raise
        return weights.again_into(engine)

    def _draw(self, number: int, weights: Shipment, call: tuple[Any, ...]) -> list[Rollout]:
        def draw(engine: WorkerGroup) -> list[Rollout]:
            rollouts: list[Rollout] = engine.call_each("generate", [call])[0]
            return rollouts

        def catch_up_and_draw(engine: WorkerGroup) -> list[Rollout]:
            weights.again_into(engine)
            return draw(engine)

        engine = self._engines[number]
        try:
            return draw(engine)
        except WorkerError as error:
            if not engine.is_lost or self._closed.is_set():
                raise
            return self._replaced(number, error, catch_up_and_draw)

    def _replaced(self, number: int, error: WorkerError, do: Callable[[WorkerGroup], T]) -> T:
        """What `do` makes of the engine that takes the place of a lost one."""
        self._say(f"{str(error).splitlines()[0]}. Another engine takes its place")
        lost_at = time.monotonic()
        engine = self._engines[number] = self._start_engine(number)
        value = do(engine)
        self._say(
            f"the engine in its place has caught up, {time.monotonic() - lost_at:.0f} s later"
        )
        return value


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
