"""The optimizer under real `fully_shard` and `parallelize_module` equals one process, in fp64."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.optim.build import build_optimizer
from nemo_like.optim.layout import layout_of
from nemo_like.optim.norm import clip_gradients

LAYOUTS = ("fsdp4", "fsdp2", "hsdp2x2", "tp2", "tp4", "fsdp2_tp2")
STEPS = 5
MAX_NORM = 0.05
CONFIG = {
    "lr": 0.02,
    "weight_decay": 0.1,
    "muon_use_nesterov": True,
    "muon_ns_dtype": "float64",
}


class Net(nn.Module):
    """Rows of 11, 18, 12, 7, 3 and 2: over four ranks even, uneven, and with empty shards."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 18, bias=False)
        self.down = nn.Linear(18, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.odd = nn.Linear(12, 7)
        self.tiny = nn.Linear(7, 3, bias=False)
        self.last = nn.Linear(3, 2, bias=False)
        self.mesh = None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.down(torch.tanh(self.up(x))))
        return self.last(torch.tanh(self.tiny(torch.tanh(self.odd(x)))))


def build_net(layout: str = "", dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(1)
    net = Net().to(dtype)
    match layout:
        case "fsdp4":
            net.mesh = init_device_mesh("cpu", (4,))
            fully_shard(net, mesh=net.mesh)
        case "fsdp2":  # twice the same, side by side
            net.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
            fully_shard(net, mesh=net.mesh["b"])
        case "hsdp2x2":
            net.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
            fully_shard(net, mesh=net.mesh)
        case "tp2":
            net.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "tp"))
            parallelize_net(net, net.mesh["tp"])
        case "tp4":
            net.mesh = init_device_mesh("cpu", (4,))
            parallelize_net(net, net.mesh)
        case "fsdp2_tp2":
            net.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            parallelize_net(net, net.mesh["tp"])
            fully_shard(net, mesh=net.mesh["dp"])
    return net


def parallelize_net(net: Net, mesh) -> None:
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    parallelize_module(net, mesh, plan)


def backward(net: Net, step: int) -> None:
    tokens = torch.randint(11, (5, 6), generator=torch.Generator().manual_seed(step))
    net.zero_grad()
    net(tokens).square().sum().backward()


def train(net: Net, optimizer, steps=range(STEPS)) -> list[float]:
    norms = []
    for step in steps:
        backward(net, step)
        optimizer.watch = True
        norms.append(clip_gradients(optimizer.param_groups, MAX_NORM))
        optimizer.step()
    return norms


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build(net: Net, name: str):
    config = OptimizerConfig(optimizer=name, **CONFIG)
    layout = partial(layout_of, over=net.mesh)
    return build_optimizer(net.named_parameters(), config, layout=layout)[0]


Run = tuple[dict[str, Tensor], list[float], dict[str, float]]


def run_layout(layout: str, name: str) -> Run:
    """The weights after some steps, the norms on the way, and metrics of the last step."""
    net = build_net(layout)
    optimizer = build(net, name)
    norms = train(net, optimizer)
    return {n: whole(p) for n, p in net.named_parameters()}, norms, optimizer.metrics()


alone = cache(partial(run_layout, ""))


@pytest.mark.parametrize("name", ["muon", "adam", "sgd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_on_any_layout_equal_one_process(pool, layout, name):
    expected, expected_norms, expected_metrics = alone(name)
    answers = pool(4).run(run_layout, layout, name)
    for weights, norms, metrics in answers:
        assert norms == pytest.approx(expected_norms, rel=1e-9)
        told = {key: metrics[key] for key in expected_metrics}  # others tell of the exchange
        assert told == pytest.approx(expected_metrics, rel=1e-9)
        for key, weight in expected.items():
            torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-12)
        assert (norms, told) == (answers[0][1], {key: answers[0][2][key] for key in told})


def has_empty_shard() -> bool:
    net = build_net("fsdp4")
    return any(p.to_local().numel() == 0 for p in net.parameters())


def test_the_layouts_include_empty_shards(pool):
    assert any(pool(4).run(has_empty_shard))


def count_reductions() -> int:
    from torch.distributed.tensor.debug import CommDebugMode

    net = build_net("fsdp2_tp2")
    groups = build(net, "adam").param_groups
    backward(net, 0)
    with CommDebugMode() as counted:
        clip_gradients(groups, None)
    return counted.get_total_counts()


def test_the_gradient_norm_costs_one_reduction(pool):
    assert pool(4).run(count_reductions) == [1] * 4


def refuse_partial() -> str:
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (4,))
    p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    p.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    try:
        clip_gradients([{"params": [p], "copies": [1]}], 1.0)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_partial_gradients_have_no_norm(pool):
    assert "partial sums; reduce it first" in pool(4).run(refuse_partial)[0]


def state_of(net: Net, optimizer) -> dict:
    return {"model": net.state_dict(), "optimizer": optimizer.state_tree()}


def load(folder: str, net: Net, optimizer, *, no_dist: bool = False) -> None:
    state = state_of(net, optimizer)
    dcp.load(state, checkpoint_id=folder, no_dist=no_dist)
    optimizer.load_state_tree(state["optimizer"])


def save_half_way(layout: str, folder: str, dtype: torch.dtype) -> None:
    net = build_net(layout, dtype)
    optimizer = build(net, "muon")
    train(net, optimizer, range(3))
    dcp.save(state_of(net, optimizer), checkpoint_id=folder)
    dist.barrier()


def go_on(layout: str, folder: str, dtype: torch.dtype) -> tuple[dict, dict]:
    """The optimizer's state as loaded, and the weights after the remaining steps."""
    net = build_net(layout, dtype)
    optimizer = build(net, "muon")
    load(folder, net, optimizer, no_dist=not layout)
    state = whole_state(optimizer)
    train(net, optimizer, range(3, STEPS))
    return state, {n: whole(p) for n, p in net.named_parameters()}


def whole_state(optimizer) -> dict[str, Tensor]:
    state = optimizer.state_tree()["state"]
    return {f"{n} {key}": whole(t).clone() for n, own in state.items() for key, t in own.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_state_saved_under_fsdp_and_tensor_parallelism_continues_anywhere(
    pool, tmp_path, dtype, tolerance
):
    folder = str(tmp_path / "saved")
    straight = build_net(dtype=dtype)
    train(straight, build(straight, "muon"))
    pool(4).run(save_half_way, "fsdp2_tp2", folder, dtype)

    alone, weights = go_on("", folder, dtype)
    assert any(tensor.any() for tensor in alone.values())
    found = {"": weights}
    for layout in ("fsdp4", "tp4", "hsdp2x2", "fsdp2_tp2"):
        state, found[layout] = pool(4).run(go_on, layout, folder, dtype)[0]
        assert all(torch.equal(state[key], alone[key]) for key in alone), layout
    for layout, weights in found.items():
        for n, p in straight.named_parameters():
            torch.testing.assert_close(
                weights[n], p.detach(), rtol=0, atol=tolerance, msg=f"{n} on {layout}"
            )
