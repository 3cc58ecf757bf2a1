"""What hangs on every step: metrics, timing, checkpoints, signals and the time limit.

The algorithm reports (`phase`, `record`, `record_validation`) and asks for the next step;
everything else happens in between, so that no algorithm contains any of it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_like.checkpoint.checkpoints import Checkpoints
from nemo_like.config.run import CheckpointingConfig
from nemo_like.errors import NemoLikeError
from nemo_like.interfaces import MetricSink, Policy
from nemo_like.observability.metrics import flatten
from nemo_like.observability.timing import StepClock
from nemo_like.types import Metrics, StepStats, TrainBatch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REPEAT_S = 1.0
"""Signals that follow each other faster than this are one."""


class StopRequest:
    """Why a run should end after the step it is in; None while it should not.

    The first SIGINT, SIGTERM or SIGUSR1 asks; the same one again raises KeyboardInterrupt.
    `must_save_by` is the time since `began`, a reading of `now` (seconds).
    """

    def __init__(
        self, *, must_save_by: str | None, began: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._signal: str | None = None
        self._now = now
        self._deadline = None if must_save_by is None else began + seconds(must_save_by)

    @property
    def reason(self) -> str | None:
        """What asked for the end."""
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and self._now() >= self._deadline:
            return "checkpointing.checkpoint_must_save_by"
        return None

    def listening(self) -> AbstractContextManager[None]:
        """Inside, the signals ask."""
        return handling_signals(self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._signal == name:
            raise KeyboardInterrupt
        if self._signal is not None:  # batch systems warn with one signal and repeat with another
            return
        self._signal = name
        # Not by the console, whose lock the interrupted code may hold.
        os.write(2, f"\n{self._signal}: finishing this step; again to stop at once\n".encode())


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """The signals that ask for an end go to the handler inside; only a main thread can do that.

    A signal within a moment of the last one is the same one: `uv run` and a terminal both pass a
    Ctrl-C on, and so do batch systems that signal a whole group.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -REPEAT_S

    def once(number: int, frame: FrameType | None) -> None:
        nonlocal last
        is_repeat, last = time.monotonic() - last < REPEAT_S, time.monotonic()
        if not is_repeat:
            handler(number, frame)

    before = {number: signal.signal(number, once) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def seconds(days_hours_minutes_seconds: str) -> float:
    """The seconds of a `DD:HH:MM:SS` text."""
    days, hours, minutes, rest = map(int, days_hours_minutes_seconds.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


@dataclass(frozen=True)
class _Draft:
    """A checkpoint whose state is copied, and perhaps still being written."""

    step: int
    metrics: dict[str, float]
    position: dict[str, Any]


class RunJournal:
    """The journal of a real run.

    `position` gives, as JSON, what besides the policy a continued run needs: where in the data it
    is. `export` writes what else belongs into a checkpoint folder.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        position: Callable[[], dict[str, Any]],
        export: Callable[[Path], None],
        checkpoints: Checkpoints | None,
        config: CheckpointingConfig,
        sinks: Sequence[MetricSink],
        clock: StepClock,
        stop: StopRequest,
        steps: range,
    ) -> None:
        self._policy = policy
        self._position = position
        self._export = export
        self._checkpoints = checkpoints
        self._config = config
        self._sinks = sinks
        self._clock = clock
        self._steps = steps
        self._stop = stop
        self._train: dict[str, float] = {}
        self._validation: dict[str, float] = {}
        self._tokens = 0
        self._nested: dict[str, Mapping[str, float]] = {}
        self._draft: _Draft | None = None
        self._background = ThreadPoolExecutor(1, "commit")
        self._committing: Future[Path] | None = None
        self._saved_step = steps.start - 1
        self.given_up: str | None = None
        self.last_saved: Path | None = None
        self.last_step_done = steps.start - 1

    @property
    def first_step(self) -> int:
        """The first step still to do."""
        return self._steps.start

    @property
    def last_step(self) -> int:
        """The step that ends the run, unless something ends it before."""
        return self._steps.stop - 1

    @property
    def stopped_by(self) -> str | None:
        """What ended the run before its last step."""
        return self.given_up or self._stop.reason

    def stop(self, reason: str) -> None:
        """End the run before this step, which did nothing.

        What it took from the data goes back: the checkpoint is that of the step before.
        """
        self.given_up = reason

    def steps(self) -> Iterator[int]:
        """The steps still to do; after each: metrics, checkpoint, and what asks for an end."""
        with self._stop.listening():
            for step in self._steps:
                before = self._position()
                yield step
                if self.given_up is not None:
                    if self.last_step_done != self._saved_step:
                        self._save(self.last_step_done, before)
                    self._commit(wait=True)
                    return
                self.last_step_done = step
                is_last = step == self.last_step or self._stop.reason is not None
                # Before the checkpoint: what continues from it must not miss this step's metrics.
                self._write(step)
                if is_last or step % self._config.save_period == 0:
                    self._save(step, self._position())
                self._commit(wait=is_last or not self._config.is_async)
                if is_last:
                    return

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time spent inside is booked under this name."""
        return self._clock.phase(name)

    def beside(self, name: str, seconds: float) -> None:
        """Book seconds of work that went on while the step did something else."""
        self._clock.beside(name, seconds)

    def record(self, step: int, batch: TrainBatch, stats: StepStats) -> None:
        """Book a training step."""
        self._train, self._validation = flatten(stats.metrics), {}
        self._tokens = len(batch.token_ids_N)
        self._nested = {"train": stats.phases}

    def record_validation(self, step: int, metrics: Metrics) -> None:
        """Book a validation; before the first step it is written at once."""
        self._validation = flatten(metrics)
        if step not in self._steps:
            self._log(step, _prefixed("validation/", self._validation))
            self._validation = {}

    def close(self) -> None:
        """Finish the checkpoint that is being written, or drop it; safe to call twice.

        After a normal end there is none, and after an error that error is the one to tell.
        """
        with suppress(NemoLikeError):
            self._commit(wait=True)
        self._background.shutdown()

    def _write(self, step: int) -> None:
        timing = self._clock.finish(step, num_tokens=self._tokens, nested=self._nested)
        validation = _prefixed("validation/", self._validation)
        self._log(step, _prefixed("train/", self._train) | validation | timing)

    def _log(self, step: int, values: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.log(step, values)

    def _save(self, step: int, position: dict[str, Any]) -> None:
        if self._checkpoints is None:
            return
        with self.phase("checkpoint"):
            self._commit(wait=True)
            folder = self._checkpoints.begin(step)
            ranked = _prefixed("train:", self._train) | _prefixed("val:", self._validation)
            try:
                # Last what goes on in the background: whatever fails, nobody writes here any more.
                self._export(folder)
                self._policy.save(folder, with_optimizer=self._config.save_optimizer)
            except BaseException:
                self._checkpoints.abort(step)
                raise
            self._draft = _Draft(step, ranked, position)
            self._saved_step = step

    def _commit(self, *, wait: bool) -> None:
        """Make the draft a checkpoint once its last byte is written; with `wait`, wait for it.

        Checksums of many gigabytes take their time: that happens in the background.
        """
        if self._draft is None or self._checkpoints is None:
            return
        with self.phase("checkpoint"):
            if self._committing is None:
                if not self._is_written(wait=wait):
                    return
                self._committing = self._background.submit(
                    self._checkpoints.commit,
                    self._draft.step,
                    metrics=self._draft.metrics,
                    data=self._draft.position,
                )
            if wait or self._committing.done():
                committing, self._committing, self._draft = self._committing, None, None
                self.last_saved = committing.result()

    def _is_written(self, *, wait: bool) -> bool:
        """Whether the policy has written the draft; it is dropped if that failed."""
        assert self._draft is not None and self._checkpoints is not None
        try:
            while not self._policy.save_finished():
                if not wait:
                    return False
                time.sleep(0.05)
        except NemoLikeError:
            self._checkpoints.abort(self._draft.step)
            self._draft = None
            raise
        return True


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}
