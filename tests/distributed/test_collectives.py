"""A rank does not wait for its peers for ever."""

import time

import pytest
import torch
import torch.distributed as dist

from nemo_like.backends import collectives


def wait_for_a_peer_that_never_comes():
    group = dist.new_group(backend="gloo")
    collectives.limit(0.5)
    try:
        if dist.get_rank() == 0:
            started = time.monotonic()
            with pytest.raises(RuntimeError, match="[Tt]ime"):
                dist.all_reduce(torch.ones(1), group=group)
            return time.monotonic() - started
        time.sleep(2)
        return 0.5
    finally:
        collectives.limit(1800)


def test_a_collective_fails_when_its_limit_is_over(pool):
    assert all(0.3 < waited < 2 for waited in pool(2).run(wait_for_a_peer_that_never_comes))
