"""What processes that do not answer are doing: their Python stacks, asked for by a signal.

The answer is written in C, by whatever thread the kernel picks: it comes from a process that hangs
in a collective, in native code, or holds Python's lock. From a stopped one only its state is told,
which Linux has in /proc.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from nemo_like.cluster.failures import WorkerIdentity

ASK = signal.SIGUSR2
"""Asks a process that listens; one that does not would end with it, so only listeners get it."""
ANSWER_S = 2.0
"""How long an answer may take to begin."""
QUIET_S = 0.05
"""An answer that has not grown for so long is whole."""
NODE_S = 20.0
"""How long the other machines of a cluster may take to ask their processes."""


def listen() -> None:
    """From now on this process writes its stacks to its standard error when it is asked, or dies.

    What it forks listens too. A Python that it starts anew writes them when it is aborted.
    """
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    faulthandler.enable(file=2)
    faulthandler.register(ASK, file=2, all_threads=True)


def write(
    file: Path, ray: Any, workers: Sequence[WorkerIdentity], given_up: Sequence[WorkerIdentity]
) -> None:
    """Append the stacks of the driver and of these workers, on whatever machine they are.

    What the workers that are `given_up` have started may be ended to learn what it was doing.
    """
    here = ray.util.get_node_ip_address()
    ask = ray.remote(num_cpus=0, max_retries=0)(stacks_of)
    others = {worker.node for worker in workers} - {here}
    answers = {
        ask.options(resources={f"node:{node}": 0.001}).remote(_on(node, workers), given_up): node
        for node in sorted(others)
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n\n")
        _write_own(out)
        out.write(stacks_of(_on(here, workers), given_up))
        done, silent = (
            ray.wait(list(answers), num_returns=len(answers), timeout=NODE_S)
            if answers
            else ([], [])
        )
        for ref in done:
            try:
                out.write(ray.get(ref, timeout=NODE_S))
            except ray.exceptions.RayError as exc:
                out.write(f"== node {answers[ref]}: {exc}\n\n")
        out.writelines(f"== node {answers[ref]}: no answer\n\n" for ref in silent)


def stacks_of(workers: Sequence[WorkerIdentity], given_up: Sequence[WorkerIdentity]) -> str:
    """The stacks of workers of this machine, and of what they started, one after the other."""
    return "".join(
        _section(pid, worker, may_end=pid != worker.pid and worker in given_up)
        for worker in workers
        for pid in _tree(worker.pid)
    )


def _on(node: str, workers: Iterable[WorkerIdentity]) -> list[WorkerIdentity]:
    return [worker for worker in workers if worker.node == node]


def _write_own(out: TextIO) -> None:
    out.write(f"== driver (pid {os.getpid()})\n")
    out.flush()
    faulthandler.dump_traceback(out, all_threads=True)
    out.write("\n")


def _section(pid: int, worker: WorkerIdentity, *, may_end: bool) -> str:
    try:
        facts = _facts(pid)
        who = str(worker) if pid == worker.pid else f"pid {pid}, started by {worker}"
        told = _ask(pid, facts, worker.log_file, may_end=may_end)
    except (FileNotFoundError, ProcessLookupError):
        return f"== pid {pid} of {worker}\nit is gone\n\n"
    return f"== {who}: {facts['Name']}, {facts['State']}\n{told.strip()}\n\n"


def _ask(pid: int, facts: dict[str, str], log: Path, *, may_end: bool) -> str:
    """What this process writes to the log when it is asked, or why it does not."""
    start = log.stat().st_size
    if facts["State"].startswith("T"):
        return "it is stopped: no signal but SIGCONT reaches it"
    if _catches(facts, ASK):
        os.kill(pid, ASK)
    elif may_end and _catches(facts, signal.SIGABRT):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        os.kill(pid, signal.SIGABRT)
    else:
        return "it is no Python process that could be asked"
    return _written(log, start) or f"no answer within {ANSWER_S:g} s"


def _written(log: Path, start: int) -> str:
    """What a log has grown by, as soon as it grows no more."""
    size, deadline = start, time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        time.sleep(QUIET_S)
        before, size = size, log.stat().st_size
        if size == before > start:
            break
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _facts(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name: value.strip() for name, _, value in pairs}


def _catches(facts: dict[str, str], number: signal.Signals) -> bool:
    return bool(int(facts["SigCgt"], 16) >> (number - 1) & 1)


def _tree(pid: int) -> Iterator[int]:
    """A process and all that it started, parents first."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            continue
        for child in found:
            yield from _tree(int(child))
