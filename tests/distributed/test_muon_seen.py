"""What a watched step tells of the exchange."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.optim.build import build_optimizer
from nemo_like.optim.diagnostics import Stopwatch
from nemo_like.optim.exchange import Exchange
from nemo_like.optim.layout import layout_on
from nemo_like.optim.plan import make_plan

CPU = torch.device("cpu")
SLOW_S = 0.3


def run_with_a_slow_owner() -> list[list[float]]:
    """Rank 0 owns one matrix, and takes its time."""
    plan = make_plan([layout_on((8, 8), torch.arange(4), [Shard(0)])])
    rank, watch = dist.get_rank(), Stopwatch(CPU)
    exchange = Exchange(plan, None, rank=rank, device=CPU, wire_dtype=torch.float32)

    def compute(numbers, wholes):
        time.sleep(SLOW_S if numbers else 0.0)
        return wholes

    dist.barrier()
    list(exchange.updates(lambda numbers: dict.fromkeys(numbers, torch.ones(2, 8)), compute, watch))
    return watch.table(1).tolist()


def test_what_an_owner_computes_is_what_the_others_wait_for(pool):
    ((owner,), *others) = pool(4).run(run_with_a_slow_owner)
    there, compute, back = owner
    assert compute >= 1e3 * SLOW_S > there + back
    for ((_, compute, back),) in others:
        assert compute < 1e3 * SLOW_S / 2 < back


def watch_one_step() -> dict[str, float]:
    """Two matrices, of 64 and 32 elements."""
    mesh = init_device_mesh("cpu", (4,))
    shapes = {"a": (8, 8), "b": (8, 4)}
    named = {
        name: nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)]))
        for name, shape in shapes.items()
    }
    optimizer = build_optimizer(named.items(), OptimizerConfig(optimizer="muon", lr=0.5))[0]
    for parameter in named.values():
        parameter.grad = parameter.detach().clone()
    optimizer.watch = True
    optimizer.step()
    return optimizer.metrics()


def test_every_rank_tells_the_same_of_the_exchange(pool):
    answers = pool(4).run(watch_one_step)
    assert all(answer == answers[0] for answer in answers)
    found = answers[0]
    # Three quarters of each matrix travel, there and back, in bf16: 2 x 3/4 x 96 x 2 bytes.
    assert found["muon/exchange_mb"] == pytest.approx(2 * 0.75 * 96 * 2 / 4 / 1e6)
    assert found["muon/owner_imbalance"] > 2  # two matrices on four ranks
    assert found["muon/newton_schulz_ms"] > 0
    assert found["muon/exchange_wait_ms"] > 0
