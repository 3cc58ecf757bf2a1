"""One set of worker processes per world size for the whole session: starting them takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
sys.path.insert(0, str(Path(__file__).parent))
from worker_pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], WorkerPool]]:
    """`pool(4).run(function, *args)` calls a top-level function of the test file on four ranks."""
    pools: dict[int, WorkerPool] = {}

    def of(world_size: int) -> WorkerPool:
        return pools.setdefault(world_size, WorkerPool(world_size))

    yield of
    for one in pools.values():
        one.close()
