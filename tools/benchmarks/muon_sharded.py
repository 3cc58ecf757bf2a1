"""What one sharded step of Muon costs and sends: ours beside torch's, on the same DTensors.

    uv run tools/benchmarks/muon_sharded.py [--models small] [--layouts fsdp2 grid] [--repeats 5]

The ranks are processes of this machine that talk over gloo, with one thread each; where there are
fewer cores than ranks, they take turns. Weights are those of `muon.py`, in fp32 and on a mesh: rows
over 2 or 4 ranks as FSDP2 has them, or rows over 2 and columns over 2. Both sides run Newton-Schulz
in bf16; AdamW (fused, each rank on its own shards) is in both.

Repeats of all sides are interleaved. Wall time is from one barrier to the next, CPU time the sum
over all ranks; both are medians, and ratios to torch's are medians of ratios within a repeat.
Megabytes are what a rank sends to others, the largest of all ranks. An all-gather counts as its
input to each of the others, a reduce-scatter as the shares of the others, an all-reduce as both.
The error is that of the first update, over all matrices: the distance to the same steps of one
process in fp64, relative, at the best factor.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from muon import MODELS, Make, Parameters, apart, ours, parameters_of, split, torch_muon
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.multiprocessing import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_like.optim.newton_schulz import Polynomial, coefficients, polar

LAYOUTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "fsdp2": ((2,), [Shard(0)]),
    "fsdp4": ((4,), [Shard(0)]),
    "grid": ((2, 2), [Shard(0), Shard(1)]),
}
SIDES: dict[str, tuple[Make, tuple[Polynomial, ...]]] = {
    "torch Muon + AdamW fused": (torch_muon, coefficients("simple", 5)),
    "ours": (ours("simple"), coefficients("simple", 5)),
    "ours, minimax": (ours("minimax"), coefficients("minimax", 4)),
}


class Traffic(TorchDispatchMode):
    """Collectives by name, and the bytes that this rank sends in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count a collective and let it run; a DTensor first becomes what it does on this rank."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        match function._schema.name:
            case "_c10d_functional::all_gather_into_tensor":
                X, ranks, _ = args
                self._count("all-gather", X.nbytes * (ranks - 1))
            case "_c10d_functional::reduce_scatter_tensor":
                X, _, ranks, _ = args
                self._count("reduce-scatter", X.nbytes * (ranks - 1) / ranks)
            case "_c10d_functional::all_reduce":
                X, _, group = args
                ranks = dist.distributed_c10d._resolve_process_group(group).size()
                self._count("all-reduce", 2 * X.nbytes * (ranks - 1) / ranks)
            case "c10d::allreduce_":
                ranks = dist.get_world_size()
                self._count("all-reduce", sum(2 * X.nbytes * (ranks - 1) / ranks for X in args[0]))
            case "c10d::alltoall_base_":
                kept = args[4][dist.get_rank()] * args[1].itemsize
                self._count("all-to-all", args[1].nbytes - kept)
            case name if "c10d" in name and not name.endswith(("::wait_tensor", "autograd")):
                raise NotImplementedError(f"what {name} sends is not known")
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, sent: float) -> None:
        self.calls[name] += 1
        self.sent += sent


@dataclass
class Measured:
    """What one rank finds of one side; seconds are of each repeat."""

    calls: Counter[str]
    sent: float
    error: float
    wall: list[float]
    cpu: list[float]


def placed(whole: Parameters, mesh: DeviceMesh, placements: list[Placement]) -> Parameters:
    """The parameters and their gradients on a mesh; a vector is not cut along the columns."""
    found = {}
    for name, p in whole.items():
        own = [Replicate() if one == Shard(1) and p.ndim == 1 else one for one in placements]
        weight, gradient = (
            distribute_tensor(tensor, mesh, own, src_data_rank=None)
            for tensor in (p.detach(), p.grad)
        )
        found[name] = nn.Parameter(weight)
        found[name].grad = gradient
    return found


def first_update_error(whole: Parameters, moved: Parameters, rows: tuple[Polynomial, ...]) -> float:
    """The distance of the update to that of one process in fp64, in the mean over matrices."""
    found = []
    for p, q in zip(split(whole)[0], split(moved)[0], strict=True):
        assert p.grad is not None and isinstance(q, DTensor)  # the weight was zero before
        exact = polar(p.grad.double(), rows=rows, dtype=torch.float64)
        found.append(apart(-q.detach().full_tensor().double(), exact))
    return statistics.mean(found)


def measure(model: str, layout: str, repeats: int) -> dict[str, Measured]:
    """All sides, on this rank."""
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    whole = parameters_of(model, "cpu")
    steps, found = {}, {}
    for name, (make, rows) in SIDES.items():
        moved = placed(whole, mesh, placements)
        steps[name] = make(moved)
        with Traffic() as traffic:
            steps[name]()
        error = first_update_error(whole, moved, rows)
        found[name] = Measured(traffic.calls, traffic.sent, error, [], [])
    for _ in range(repeats):
        for name, step in steps.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            dist.barrier()
            found[name].wall.append(time.perf_counter() - wall)
            found[name].cpu.append(time.process_time() - cpu)
    return found


def serve(rank: int, size: int, folder: str, arguments: tuple[str, str, int]) -> None:
    """One rank; what it finds goes into a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=store)
    found = measure(*arguments)
    Path(folder, str(rank)).write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def ranks_of(model: str, layout: str, repeats: int) -> list[dict[str, Measured]]:
    """What each rank of a layout finds."""
    size = torch.Size(LAYOUTS[layout][0]).numel()
    with tempfile.TemporaryDirectory() as folder:
        spawn(serve, (size, folder, (model, layout, repeats)), nprocs=size)
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(size)]


def compare(model: str, layout: str, repeats: int) -> Iterator[str]:
    """Lines of the table of one layout."""
    ranks = ranks_of(model, layout, repeats)
    first = totals(ranks, next(iter(SIDES)))
    for name in SIDES:
        own = [rank[name] for rank in ranks]
        wall, cpu = totals(ranks, name)
        ratios = (
            statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in zip((wall, cpu), first, strict=True)
        )
        calls = ", ".join(f"{number} {kind}" for kind, number in sorted(own[0].calls.items()))
        cells = [
            f"{model}, {layout}",
            name,
            calls,
            f"{max(one.sent for one in own) / 1e6:.1f}",
            f"{statistics.median(wall) * 1e3:.0f}",
            f"{statistics.median(cpu) * 1e3:.0f}",
            " / ".join(f"{ratio:.2f}" for ratio in ratios),
            f"{own[0].error:.1%}",
        ]
        yield "| " + " | ".join(cells) + " |"


def totals(ranks: list[dict[str, Measured]], name: str) -> tuple[list[float], list[float]]:
    """Of each repeat the wall time of the slowest rank, and the CPU time of all together."""
    own = [rank[name] for rank in ranks]
    walls, cpus = (
        zip(*[one.wall for one in own], strict=True),
        zip(*[one.cpu for one in own], strict=True),
    )
    return [max(repeat) for repeat in walls], [sum(repeat) for repeat in cpus]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["small"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before the ranks start
    cores = len(os.sched_getaffinity(0))
    print(f"load average {os.getloadavg()[0]:.1f}, {cores} cores, torch {torch.__version__}\n")
    print(
        "| weights | step | collectives of a step | MB sent | wall ms | CPU ms | ratios | error |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model in options.models:
        for layout in options.layouts:
            for line in compare(model, layout, options.repeats):
                print(line, flush=True)


if __name__ == "__main__":
    main()
