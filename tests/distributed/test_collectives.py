"""A rank does not wait for its peers for ever."""

import time

import pytest
import torch
import torch.distributed as dist

from nemo_like.backends import collectives
from nemo_like.backends.agreement import ERROR, refuse_mismatch
from nemo_like.errors import MismatchError
from nemo_like.types import Metric


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


def refuse_what_one_rank_sees(limit):
    own = {ERROR: Metric(1.6, "mean", weight=3.0)} if dist.get_rank() == 0 else {}
    other = {ERROR: Metric(1.0, "mean", weight=1.0)} if dist.get_rank() == 1 else {}
    try:
        refuse_mismatch(3, own | other, limit, torch.device("cpu"))
    except MismatchError as error:
        return str(error).split(" per token")[0]


def test_whether_a_step_is_refused_is_decided_by_the_mean_over_all_ranks_on_each(pool):
    assert pool(2).run(refuse_what_one_rank_sees, 1.46) == [None, None]
    said = "step 3: engine and policy differ by a factor of 1.4500"
    assert pool(2).run(refuse_what_one_rank_sees, 1.44) == [said, said]
