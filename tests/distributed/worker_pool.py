"""Worker processes that are started once and then run one test function after the other."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import _lru_cache_wrapper, cache
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120.0
MANY_THREADS = 100
"""Each process group has three, which wake up all the time."""
GRACE_S = 5.0
"""How long the other ranks may take to fail too, before they count as stuck in a collective."""
_HERE = Path(__file__).parent


class WorkerPool:
    """Ranks 0 to `world_size - 1` of one gloo process group.

    `run(function, *args)` calls a top-level function of a test file on every rank, and returns what
    each of them returned, in order of rank. What a rank raises is raised here with its traceback.
    Ranks that are then stuck, or that take too long, are killed all together, and the next `run`
    starts fresh ones.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        if not all(worker.is_alive() for worker in self._workers):
            self.close()
        if not self._workers:
            self._start()
        call = pickle.dumps((inspect.getfile(function), function.__name__, args))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        return self._collect(function.__name__, timeout_s)

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._workers, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "rendezvous"
        for rank in range(self.world_size):
            here, there = context.Pipe()
            worker = context.Process(
                target=_serve, args=(rank, self.world_size, str(store), there), daemon=True
            )
            worker.start()
            there.close()
            self._workers.append(worker)
            self._pipes.append(here)
        self._collect("start", START_TIMEOUT_S)

    def _collect(self, what: str, timeout_s: float) -> list[Any]:
        """The answers of all ranks, or the first failure, raised."""
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        failure = ""
        while len(answers) < self.world_size:
            waiting = [p for rank, p in enumerate(self._pipes) if rank not in answers]
            ready = wait_for_any(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [r for r in range(self.world_size) if r not in answers]
                self.close()
                failure = failure or f"ranks {missing} gave no answer within {timeout_s:g} s"
                break
            for rank in (self._pipes.index(pipe) for pipe in ready):
                failed, answers[rank] = self._receive(rank)
                if failed and not failure:
                    failure = f"rank {rank} of {self.world_size}:\n{answers[rank]}"
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failure:
            raise AssertionError(f"{what} failed: {failure}")
        return [answers[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._workers[rank].join()
            return True, f"the process died with exit code {self._workers[rank].exitcode}"


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    """The life of a worker: answer calls until the pipe closes, each in a group of its own.

    What a call leaves of process groups ends with the next, when every rank has answered: their
    threads wake up all the time.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    sys.path.insert(0, str(_HERE.parent / "reference"))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    pipe.send_bytes(pickle.dumps((False, None)))
    for number in count():
        try:
            file, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if dist.is_initialized():
                _leave_world()
            address = f"file://{store}_{number}"
            dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=address)
            torch.manual_seed(0)
            # Plain pickling: a connection of its own accord would put tensors into shared memory.
            answer = pickle.dumps((False, getattr(_module(file), name)(*args)))
        except BaseException:  # the traceback is the answer, and the pool ends this process
            answer = pickle.dumps((True, traceback.format_exc()))
        pipe.send_bytes(answer)


def _leave_world() -> None:
    """Ends all process groups, and lets go of what would keep their threads alive."""
    import torch.distributed as dist
    from torch.distributed.tensor import _redistribute, debug

    dist.destroy_process_group()
    gc.collect()  # models refer to themselves, and to their groups
    if len(os.listdir("/proc/self/task")) > MANY_THREADS:
        # For the life of a process DTensor remembers layouts, each with its mesh.
        debug._clear_sharding_prop_cache()
        _redistribute.clear_redistribute_planner_cache()
        for found in gc.get_objects():
            if type(found) is _lru_cache_wrapper and found.__module__.startswith("torch."):
                found.cache_clear()
        gc.collect()


@cache
def _module(file: str) -> Any:
    """The test file as a module, by its path: pytest's import modes give it various names."""
    spec = importlib.util.spec_from_file_location(f"worker_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
