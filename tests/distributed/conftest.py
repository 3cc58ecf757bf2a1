"""One set of worker processes per world size for all tests: starting them takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from worker_pool import WorkerPool

_pools: dict[int, WorkerPool] = {}


@pytest.fixture(scope="session")
def pool() -> Callable[[int], WorkerPool]:
    """`pool(4).run(function, *args)` calls a top-level function of the test file on four ranks."""
    return lambda world_size: _pools.setdefault(world_size, WorkerPool(world_size))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the processes with the last test in this folder: their threads wake up all the time."""
    here = Path(__file__).parent
    if nextitem is None or here not in nextitem.path.parents:
        while _pools:
            _pools.popitem()[1].close()
