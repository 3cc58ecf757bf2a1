"""What went wrong in a worker, and how it is told: one cause, readable, in the driver."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_like.cluster import memory
from nemo_like.errors import NemoLikeError, WorkerError

LOG_TAIL_LINES = 20


@dataclass(frozen=True)
class WorkerIdentity:
    """Who a worker is, in words for a message."""

    group: str
    rank: int
    world_size: int
    log_file: Path
    node: str = "not placed yet"
    pid: int = 0

    def __str__(self) -> str:
        return (
            f"{self.group} rank {self.rank} of {self.world_size} (node {self.node}, pid {self.pid})"
        )


@dataclass(frozen=True)
class Failure:
    """One worker's failed call. Picklable whatever the exception was.

    `error` is the exception itself where it is one of ours; others are kept as text, because their
    classes need not exist, or unpickle, in the driver.
    """

    worker: WorkerIdentity
    phase: str
    message: str
    trace: str = ""
    error: NemoLikeError | None = None
    died: bool = False

    @classmethod
    def of(cls, exception: Exception, worker: WorkerIdentity, phase: str) -> Failure:
        """The record of an exception that a worker's object raised."""
        return cls(
            worker=worker,
            phase=phase,
            message=memory.told(exception, phase, worker.group)
            or f"{type(exception).__name__}: {exception}",
            trace="".join(traceback.format_exception(exception)),
            error=exception if isinstance(exception, NemoLikeError) else None,
        )


def died(worker: WorkerIdentity, phase: str, reason: str = "") -> Failure:
    """The record of a process that is gone."""
    message = (
        "the process ended without an exception (kill -9, out of memory, or a crash in native code)"
    )
    return Failure(worker, phase, f"{message}. {reason}".rstrip(), died=True)


def to_error(failures: Sequence[Failure]) -> NemoLikeError:
    """The one error that these failures of a call amount to.

    A dead process is the cause of what its peers report (a broken connection), and an error of ours
    says more than one of torch; else the first that arrived is the cause.
    """
    cause = min(failures, key=lambda f: (not f.died, f.error is None))
    others = [f for f in failures if f is not cause]
    if cause.error is not None:
        error = cause.error
        error.args = (f"{error} [{cause.worker}, in {cause.phase}]", *error.args[1:])
        return error
    lines = [
        f"{cause.worker} {'died' if cause.died else 'failed'} in {cause.phase}: {cause.message}"
    ]
    lines += [f"then: {f.worker} in {f.phase}: {_first_line(f.message)}" for f in others]
    if cause.trace:
        lines += ["In the worker:", _indented(cause.trace)]
    return WorkerError("\n".join([*lines, *_log_end(cause.worker)]))


def hang_error(
    silent: Sequence[WorkerIdentity], phase: str, limit: str, stacks: str
) -> WorkerError:
    """The error of workers that did not answer in time.

    Args:
        silent: Those workers.
        phase: The call, or what else was waited for.
        limit: How long, and which key says so.
        stacks: Where the stacks of all processes are.
    """
    who = ", ".join(str(worker) for worker in silent)
    lines = [
        f"no answer to {phase} within {limit} from {who}. Either they hang, or the call needs "
        "longer: then raise cluster.worker_timeout_s",
        f"Stacks of all processes: {stacks}",
    ]
    return WorkerError("\n".join([*lines, *_log_end(silent[0])]))


def _log_end(worker: WorkerIdentity) -> list[str]:
    if not worker.log_file.is_file():
        return [f"Log: {worker.log_file} on node {worker.node}"]
    lines = worker.log_file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    end = [f"its last {len(lines)} line(s):", _indented("\n".join(lines))] if lines else ["empty"]
    return [f"Log: {worker.log_file}, {end[0]}", *end[1:]]


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else text
