"""Owners and buckets, worked out without any process."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from nemo_like.optim.layout import layout_on
from nemo_like.optim.plan import make_plan, newton_schulz_flops
from nemo_like.optim.views import View

QWEN2_5_7B = 28 * [
    (3584, 3584), (512, 3584), (512, 3584), (3584, 3584),
    (18944, 3584), (18944, 3584), (3584, 18944),
]  # fmt: skip
LAYOUTS = {
    "FSDP": ((64,), [Shard(0)]),
    "FSDP x TP": ((8, 8), [Shard(0), Shard(1)]),
    "HSDP": ((4, 16), [Replicate(), Shard(0)]),
    "HSDP x TP": ((2, 4, 8), [Replicate(), Shard(1), Shard(0)]),
}


def plan_of(shapes, mesh_shape, placements, **options):
    mesh = torch.arange(torch.Size(mesh_shape).numel()).view(mesh_shape)
    return make_plan([layout_on(shape, mesh, placements) for shape in shapes], **options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_64_ranks_share_the_work_of_qwen2_5_7b_within_1_30_of_ideal(name):
    plan = plan_of(QWEN2_5_7B, *LAYOUTS[name], bucket_elements=32e6)
    assert plan.imbalance < 1.30
    flops = sum(newton_schulz_flops(r, c, 5) for r, c in QWEN2_5_7B)
    assert sum(plan.loads.values()) == flops, "each matrix is computed once"


def test_a_step_of_newton_schulz_costs_three_products():
    # [2, 3] x [3, 2], [2, 2] x [2, 2] and [2, 2] x [2, 3], two FLOPs per multiplication.
    assert newton_schulz_flops(3, 2, steps=1) == 2 * (2 * 3 * 2 + 2 * 2 * 2 + 2 * 2 * 3)


def test_a_packed_matrix_costs_what_its_parts_cost():
    layout = layout_on((12, 8), torch.arange(2), [Shard(0)])
    (matrix,) = make_plan([layout], [View(sizes=(8, 2, 2))]).matrices
    assert matrix.flops == sum(newton_schulz_flops(rows, 8, 5) for rows in (8, 2, 2))


def test_every_matrix_travels_in_one_bucket_and_no_owner_exceeds_the_limit():
    limit = 32e6
    plan = plan_of(QWEN2_5_7B, (64,), [Shard(0)], bucket_elements=limit)
    assert sorted(i for bucket in plan.buckets for i in bucket) == list(range(len(QWEN2_5_7B)))
    for bucket in plan.buckets:
        for rank in plan.ranks:
            own = [plan.matrices[i].numel for i in bucket if plan.owners[i] == rank]
            assert len(own) <= 1 or sum(own) <= limit


def test_blocks_go_to_the_owner_once_and_come_back_to_every_copy():
    plan = plan_of([(6, 4)], (2, 2), [Replicate(), Shard(0)])
    there, back = plan.gathering([0]), plan.returning([0])
    assert sorted(route.block.offset for route in there) == [(0, 0), (3, 0)]
    assert {route.target for route in there} == {plan.owners[0]}
    assert sorted(route.target for route in back) == [0, 1, 2, 3]
    assert {route.source for route in back} == {plan.owners[0]}
    # Of its own copies the owner needs none: one block there, three back.
    assert plan.traffic([0]) == 12 + 3 * 12


def test_experts_that_one_rank_holds_whole_stay_there():
    plan = plan_of([(8, 6, 4)], (4,), [Shard(0)])
    assert plan.buckets == ()
    assert plan.owners == (0, 0, 1, 1, 2, 2, 3, 3)


def test_experts_that_are_cut_travel_within_their_own_ranks():
    plan = plan_of([(4, 6, 4)], (2, 2), [Shard(0), Shard(1)])
    assert [plan.owners[e] // 2 for e in range(4)] == [0, 0, 1, 1]
    assert len(plan.buckets) == 1 and plan.imbalance == 1.0


def test_one_process_has_nothing_to_send():
    plan = plan_of(QWEN2_5_7B, (1,), [Shard(0)])
    assert plan.buckets == () and plan.imbalance == 1.0
    assert len(plan.at_home) == len(QWEN2_5_7B)


def test_a_plan_does_not_depend_on_who_makes_it_or_when():
    digests = {plan_of(QWEN2_5_7B[:7], (4,), [Shard(0)]).digest() for _ in range(2)}
    assert len(digests) == 1
    assert plan_of(QWEN2_5_7B[6::-1], (4,), [Shard(0)]).digest() not in digests
    assert plan_of(QWEN2_5_7B[:7], (4,), [Shard(0)], bucket_elements=1).digest() not in digests


def test_36_thousand_experts_on_128_ranks_are_planned_in_seconds():
    stacks = 94 * [(128, 1536, 4096), (128, 4096, 768)]
    plan = plan_of(stacks, (128,), [Shard(0)])
    assert len(plan.matrices) == 94 * 2 * 128 and plan.imbalance == 1.0
