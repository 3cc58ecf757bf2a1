"""Muon over every way to lay a matrix over ranks equals one process, with what it should send."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import nemo_like.optim.muon
from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.optim.build import build_optimizer
from nemo_like.optim.layout import layout_of
from nemo_like.optim.views import AttentionShape

STEPS = 5
MATRICES = {
    "square.weight": (64, 64),
    "odd.weight": (65, 48),
    "wide.weight": (48, 130),
    "flat.weight": (3, 40),
    "small.weight": (2, 7),
    "tall.weight": (128, 32),
    "experts.up_proj": (5, 6, 8),
    "self_attn.qkv_proj.weight": (24, 16),
}
PLACED = {
    "FSDP over 2": ((2,), [Shard(0)]),
    "FSDP over 3": ((3,), [Shard(0)]),
    "FSDP over 4": ((4,), [Shard(0)]),
    "columns over 4": ((4,), [Shard(1)]),
    "copies on 4": ((4,), [Replicate()]),
    "HSDP": ((2, 2), [Replicate(), Shard(0)]),
    "rows x columns": ((2, 2), [Shard(0), Shard(1)]),
    "rows x rows": ((2, 2), [Shard(0), Shard(0)]),
    "copies x rows on half of the ranks": ((1, 2), [Replicate(), Shard(0)]),
}
PACKED = AttentionShape(num_heads=4, num_kv_heads=1, head_dim=4, family="phi3")
SMALL_BUCKETS = {"muon_bucket_mb": 0.005}
FP64 = torch.float64


def tensors(seed: int, dtype=FP64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g, dtype=FP64).to(dtype) for n, s in MATRICES.items()}


def config(**options) -> OptimizerConfig:
    chosen = {
        "lr": 0.02,
        "weight_decay": 0.1,
        "muon_use_nesterov": True,
        "muon_ns_dtype": "float64",
    }
    return OptimizerConfig(optimizer="muon", **chosen | options)


def place(tensor: Tensor, mesh: DeviceMesh, placements) -> DTensor:
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def gradients(step: int, dtype) -> dict[str, Tensor]:
    """Of every step, some that are zero here and there: whole matrices, and parts of them."""
    made = tensors(100 + step, dtype)
    if step == 3:
        made["wide.weight"].zero_()
        made["odd.weight"][:40] = 0
        made["experts.up_proj"][2] = 0
        made["self_attn.qkv_proj.weight"][4:20] = 0  # three heads of q, and k
    return made


def weights_and_momenta(parameters: dict, optimizer) -> dict[str, Tensor]:
    state = optimizer.state_tree()["state"]
    found = {f"{n} momentum": t["momentum_buffer"] for n, t in state.items()}
    return found | {n: p.detach() for n, p in parameters.items()}


def train_alone(options: dict, dtype=FP64) -> dict[str, Tensor]:
    parameters = {n: nn.Parameter(t) for n, t in tensors(0, dtype).items()}
    optimizer = build_optimizer(parameters.items(), config(**options), attention=PACKED)[0]
    for step in range(STEPS):
        for name, gradient in gradients(step, dtype).items():
            parameters[name].grad = gradient
        optimizer.step()
    found = {n: p.detach() for n, p in parameters.items()}
    return found | {
        f"{n} momentum": t["momentum_buffer"] for n, t in optimizer.state_tree()["state"].items()
    }


def train_placed(name: str, options: dict, dtype=FP64) -> dict[str, Tensor] | None:
    shape, placements = PLACED[name]
    size = torch.Size(shape).numel()
    mesh = DeviceMesh("cpu", torch.arange(size).view(shape))
    if dist.get_rank() >= size:
        return None
    parameters = {n: nn.Parameter(place(t, mesh, placements)) for n, t in tensors(0, dtype).items()}
    optimizer = build_optimizer(parameters.items(), config(**options), attention=PACKED)[0]
    for step in range(STEPS):
        kept = {}
        for n, gradient in gradients(step, dtype).items():
            parameters[n].grad = place(gradient, mesh, placements)
            kept[n] = parameters[n].grad.to_local().clone()
        optimizer.step()
        assert all(torch.equal(p.grad.to_local(), kept[n]) for n, p in parameters.items())
    found = weights_and_momenta(parameters, optimizer)
    return {n: t.full_tensor() for n, t in found.items()}


@pytest.mark.parametrize(
    "options", [{}, SMALL_BUCKETS | {"muon_split_heads": True}], ids=["one", "buckets"]
)
@pytest.mark.parametrize("name", PLACED)
def test_five_steps_on_any_placement_equal_one_process(pool, name, options):
    expected = train_alone(options)
    for found in filter(None, pool(4).run(train_placed, name, options)):
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["FSDP over 3", "rows x columns", "HSDP"])
def test_in_bf16_a_layout_changes_no_bit(pool, name):
    options = {"muon_ns_dtype": "bfloat16"}
    expected = train_alone(options, torch.float32)
    found = pool(4).run(train_placed, name, options, torch.float32)[0]
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, msg=key)


def train_few(shapes: dict[str, tuple], placements, dim_sizes: tuple, step: int = 0) -> dict:
    """One step of matrices of these shapes, of which ranks may hold nothing."""
    mesh = init_device_mesh("cpu", dim_sizes)
    named = {n: place(t, mesh, placements) for n, t in few(shapes, 0).items()}
    return step_of_few(named, {n: place(t, mesh, placements) for n, t in few(shapes, 1).items()})


def few(shapes: dict[str, tuple], seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(s, generator=g, dtype=FP64) for n, s in shapes.items()}
    if seed and "c_attn.weight" in made:
        made["c_attn.weight"][0] = 0  # a row of inputs, which is no part of any matrix
    return made


def step_of_few(named: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = {n: nn.Parameter(t) for n, t in named.items()}
    for n, p in parameters.items():
        p.grad = gradients[n]
    gpt2 = AttentionShape(num_heads=2, num_kv_heads=2, head_dim=1, family="gpt2")
    optimizer = build_optimizer(parameters.items(), config(), attention=gpt2)[0]
    optimizer.step()
    found = {n: p.detach() for n, p in parameters.items()}
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}


@pytest.mark.parametrize(
    ("shapes", "placements", "sizes"),
    [
        ({"flat.weight": (3, 40)}, [Shard(0)], (4,)),
        ({"experts.up": (4, 16, 12), "a.weight": (4, 4)}, [Shard(0), Shard(1)], (2, 2)),
        ({"c_attn.weight": (5, 6)}, [Shard(1)], (4,)),
    ],
    ids=["nothing held of the only one", "nothing held of the costliest", "one column held"],
)
def test_a_rank_may_hold_little_or_nothing(pool, shapes, placements, sizes):
    expected = step_of_few(few(shapes, 0), few(shapes, 1))
    for found in pool(4).run(train_few, shapes, placements, sizes):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12, msg=name)
            assert not torch.equal(tensor, few(shapes, 0)[name]), "it moved"


def norm_with_missing_gradients() -> float:
    from nemo_like.optim.norm import clip_gradients

    mesh = init_device_mesh("cpu", (4,))
    p = nn.Parameter(place(torch.ones(8, 3, dtype=FP64), mesh, [Shard(0)]))
    if dist.get_rank() == 2:
        p.grad = place(torch.full((8, 3), 2.0, dtype=FP64), mesh, [Shard(0)])
    return clip_gradients([{"params": [p], "copies": [1]}], None)


def test_the_norm_counts_a_missing_gradient_as_zero_and_waits_for_nobody(pool):
    assert pool(4).run(norm_with_missing_gradients) == pytest.approx([24**0.5] * 4)


def half_the_gradients_missing() -> dict[str, Tensor]:
    """Two ranks with a block of experts each; the second saw no token for its own."""
    mesh = DeviceMesh("cpu", torch.arange(2))
    if dist.get_rank() >= 2:
        return {}
    named = {"a.weight": (6, 8), "b.weight": (6, 8)}
    g = torch.Generator().manual_seed(0)
    made = {n: torch.randn(s, generator=g, dtype=FP64) for n, s in named.items()}
    parameters = {n: nn.Parameter(place(t, mesh, [Shard(0)])) for n, t in made.items()}
    optimizer = build_optimizer(parameters.items(), config())[0]
    for step in range(3):
        for name, p in parameters.items():
            gradient = place(made[name] * (step + 1), mesh, [Shard(0)])
            p.grad = gradient if dist.get_rank() == 0 and (name, step) != ("b.weight", 1) else None
        optimizer.step()
    return {n: p.detach().full_tensor() for n, p in parameters.items()}


def test_a_gradient_that_is_missing_on_some_ranks_is_zero_there(pool):
    found = pool(4).run(half_the_gradients_missing)[0]
    g = torch.Generator().manual_seed(0)
    made = {n: torch.randn(6, 8, generator=g, dtype=FP64) for n in ("a.weight", "b.weight")}
    parameters = {n: nn.Parameter(t.clone()) for n, t in made.items()}
    optimizer = build_optimizer(parameters.items(), config())[0]
    for step in range(3):
        for name, p in parameters.items():
            p.grad = made[name] * (step + 1)
            p.grad[3:] = 0  # the rows of the second rank
            if (name, step) == ("b.weight", 1):
                p.grad = None
        optimizer.step()
    for name, p in parameters.items():
        torch.testing.assert_close(found[name], p.detach(), rtol=0, atol=1e-12)


def count_collectives(placement: str, options: dict) -> tuple[dict[str, int], int, int]:
    """Calls by name in one step, the number of buckets, and of matrices this rank computes."""
    from torch.distributed.tensor.debug import CommDebugMode

    shape, placements = PLACED[placement]
    mesh = init_device_mesh("cpu", shape)
    parameters = {n: nn.Parameter(place(t, mesh, placements)) for n, t in tensors(0).items()}
    optimizer = build_optimizer(parameters.items(), config(**options), attention=PACKED)[0]
    for n, gradient in tensors(1).items():
        parameters[n].grad = place(gradient, mesh, placements)
    computed = 0
    polar = nemo_like.optim.muon.polar

    def counting(X: Tensor, **options) -> Tensor:
        nonlocal computed
        computed += len(X)
        return polar(X, **options)

    with (
        patch.object(nemo_like.optim.muon, "polar", counting),
        CommDebugMode() as counted,
    ):
        optimizer.step()
    calls = {str(name): number for name, number in counted.get_comm_counts().items()}
    (muon,) = optimizer.muons
    return calls, len(muon.plan.buckets), computed


@pytest.mark.parametrize("placement", ["FSDP over 4", "HSDP", "rows x columns"])
@pytest.mark.parametrize("options", [{}, SMALL_BUCKETS], ids=["one", "buckets"])
def test_a_step_takes_two_all_to_alls_per_bucket_and_each_matrix_is_computed_once(
    pool, placement, options
):
    answers = pool(4).run(count_collectives, placement, options)
    calls, buckets, _ = answers[0]
    assert (buckets > 1) == bool(options)
    assert calls == {"c10d.alltoall_base_": 2 * buckets, "c10d.allreduce_": 1}
    experts_and_qkv = 5 + 3
    assert sum(computed for _, _, computed in answers) == len(MATRICES) - 2 + experts_and_qkv


def step_alone_on_a_mesh_of_one() -> int:
    from torch.distributed.tensor.debug import CommDebugMode

    every = [DeviceMesh("cpu", [rank]) for rank in range(4)]
    mesh = every[dist.get_rank()]
    parameters = {n: nn.Parameter(place(t, mesh, [Shard(0)])) for n, t in tensors(0).items()}
    optimizer = build_optimizer(parameters.items(), config(), attention=PACKED)[0]
    for n, gradient in tensors(1).items():
        parameters[n].grad = place(gradient, mesh, [Shard(0)])
    with CommDebugMode() as counted:
        optimizer.step()
    return counted.get_total_counts()


def test_one_rank_takes_its_steps_without_any_collective(pool):
    assert pool(4).run(step_alone_on_a_mesh_of_one) == [0] * 4


def share_copies(knows_the_mesh: bool) -> tuple[int, Tensor]:
    """How many matrices this rank computes, of a model that tensor parallelism does not cut."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    named = {f"{i}.weight": torch.full((8, 8), 1.0 + i).triu().double() for i in range(4)}
    parameters = {n: nn.Parameter(place(t, mesh["dp"], [Shard(0)])) for n, t in named.items()}
    parameters["4.weight"] = nn.Parameter(torch.eye(8, dtype=FP64))
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    layout = partial(layout_of, over=mesh) if knows_the_mesh else layout_of
    optimizer = build_optimizer(parameters.items(), config(), layout=layout)[0]
    optimizer.step()
    computed = [owner for muon in optimizer.muons for owner in muon.plan.owners]
    whole = [
        p.detach() if i == 4 else p.detach().full_tensor()
        for i, p in enumerate(parameters.values())
    ]
    return computed.count(dist.get_rank()), torch.stack(whole)


def test_copies_that_only_the_mesh_of_the_program_knows_of_share_the_work(pool):
    together = pool(4).run(share_copies, True)
    apart = pool(4).run(share_copies, False)
    assert sum(count for count, _ in together) == 5
    assert sum(count for count, _ in apart) == 2 * 4 + 4
    for _, weights in together + apart:
        torch.testing.assert_close(weights, apart[0][1], rtol=0, atol=1e-12)


def build_in_another_order() -> str:
    mesh = init_device_mesh("cpu", (4,))
    made = list(tensors(0).items())
    if dist.get_rank() == 2:
        made.reverse()
    parameters = [(n, nn.Parameter(place(t, mesh, [Shard(0)]))) for n, t in made]
    try:
        build_optimizer(parameters, config(), attention=PACKED)
    except RuntimeError as error:
        return str(error)
    return "accepted"


def test_ranks_that_would_exchange_different_matrices_stop_before_the_first_step(pool):
    answers = pool(4).run(build_in_another_order)
    assert all("would exchange different matrices" in answer for answer in answers)
