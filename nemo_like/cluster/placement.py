"""Which rank runs where: arithmetic on the configuration, without Ray and without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_like.config.policy import DTensorConfig
from nemo_like.config.run import ClusterConfig
from nemo_like.errors import ConfigError


@dataclass(frozen=True)
class ParallelAxis:
    """A number of ranks, and the configuration key it came from (for messages)."""

    size: int
    key: str


@dataclass(frozen=True)
class ParallelSizes:
    """How many ranks share a matrix, a sequence, the layers; and copies of the sharded model.

    `experts` share one set of experts in a pipeline stage, if they have ranks of their own.
    """

    tensor: ParallelAxis
    context: ParallelAxis
    pipeline: ParallelAxis
    replicate: ParallelAxis
    experts: ParallelAxis | None = None

    @classmethod
    def single(cls) -> ParallelSizes:
        """Nothing is shared."""
        one = ParallelAxis(1, "")
        return cls(one, one, one, one)

    @classmethod
    def of_dtensor(cls, config: DTensorConfig) -> ParallelSizes:
        """The sizes of the DTensor backend, which has no pipeline."""
        root = "policy.dtensor_cfg"
        return cls(
            tensor=ParallelAxis(config.tensor_parallel_size, f"{root}.tensor_parallel_size"),
            context=ParallelAxis(config.context_parallel_size, f"{root}.context_parallel_size"),
            pipeline=ParallelAxis(1, f"{root}.pipeline_parallel_size"),
            replicate=ParallelAxis(config.dp_replicate_size, f"{root}.dp_replicate_size"),
        )


@dataclass(frozen=True)
class RankPlace:
    """Where one rank runs, and its coordinates in the mesh."""

    rank: int
    node: int
    local_rank: int
    tensor: int = 0
    context: int = 0
    data: int = 0
    pipeline: int = 0


@dataclass(frozen=True)
class Seat:
    """Where a worker is: Ray's id of the machine, and what it has for CUDA_VISIBLE_DEVICES."""

    machine: str
    gpus: str


@dataclass(frozen=True)
class Placement:
    """All ranks of a group of workers. Every node holds the same number of them.

    `gpus_per_worker` is what each asks Ray for, if they use GPUs at all: 0 where they use those of
    another group.
    """

    ranks: tuple[RankPlace, ...]
    num_nodes: int
    uses_gpu: bool
    threads: int = 1
    gpus_per_worker: int = 1

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    @property
    def workers_per_node(self) -> int:
        """The number of ranks on each node."""
        return len(self.ranks) // self.num_nodes

    @property
    def num_data_parallel(self) -> int:
        """The number of parts that a batch is cut into."""
        return 1 + max(place.data for place in self.ranks)

    @property
    def device(self) -> str:
        """The torch device of every worker, which sees no GPUs but its own."""
        return "cuda:0" if self.uses_gpu else "cpu"

    @property
    def worker_resources(self) -> dict[str, float]:
        """What one worker asks Ray for."""
        asks = self.uses_gpu and self.gpus_per_worker > 0
        gpu = {"GPU": float(self.gpus_per_worker)} if asks else {}
        return {"CPU": float(self.threads)} | gpu

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What the group asks Ray for: one bundle per node, which Ray never splits."""
        amounts = {name: n * self.workers_per_node for name, n in self.worker_resources.items()}
        return [dict(amounts) for _ in range(self.num_nodes)]

    def leaders(self) -> list[int]:
        """One rank of each data-parallel part, in their order; its peers compute the same."""
        first: dict[int, int] = {}
        for place in self.ranks:
            first.setdefault(place.data, place.rank)
        return [first[part] for part in sorted(first)]


def place(cluster: ClusterConfig, sizes: ParallelSizes, *, gpus_found: int) -> Placement:
    """The ranks of a policy: tensor-parallel peers are neighbours, then context, data, pipeline.

    `gpus_found` is what a machine has; it matters only for `cluster.gpus_per_node=auto`.

    Raises:
        ConfigError: the sizes do not divide the world, or a tensor-parallel group would span
            machines.
    """
    gpus = gpus_per_node(cluster, gpus_found)
    per_node = gpus or cluster.cpu_workers_per_node
    world = cluster.num_nodes * per_node
    _check_sizes(cluster, sizes, per_node, gpus > 0)
    tp, cp, pp = sizes.tensor.size, sizes.context.size, sizes.pipeline.size
    dp = world // (tp * cp * pp)
    ranks = tuple(
        RankPlace(
            rank=rank,
            node=rank // per_node,
            local_rank=rank % per_node,
            tensor=rank % tp,
            context=rank // tp % cp,
            data=rank // (tp * cp) % dp,
            pipeline=rank // (tp * cp * dp),
        )
        for rank in range(world)
    )
    return Placement(ranks, cluster.num_nodes, gpus > 0, cluster.cpu_threads_per_worker)


def place_single(*, uses_gpu: bool, threads: int = 1, gpus: int = 1) -> Placement:
    """One worker on some machine, such as a rollout engine; `gpus` as in `gpus_per_worker`."""
    place = RankPlace(0, 0, 0)
    return Placement(
        (place,), num_nodes=1, uses_gpu=uses_gpu, threads=threads, gpus_per_worker=gpus
    )


def num_engines(gpus: int, per_engine: int, *, per_node: int) -> int:
    """How many engines these GPUs are, each on one machine of `per_node` of them.

    Raises:
        ConfigError: they do not come out even.
    """
    if min(gpus, per_node) % per_engine or not gpus:
        raise ConfigError(
            f"policy.generation.vllm_cfg.tensor_parallel_size={per_engine}: the {gpus} GPU(s) of "
            f"the engines, at most {per_node} on a machine, are no whole number of engines. Lower "
            "it, or give them others by policy.generation.colocated.resources.* and a number for "
            "cluster.gpus_per_node"
        )
    return gpus // per_engine


def shared_seat(seats: Sequence[Seat], number: int, per_engine: int) -> Seat:
    """The GPUs that engine `number` shares with as many neighbours among these workers."""
    own = seats[number * per_engine : (number + 1) * per_engine]
    machines = {seat.machine for seat in own}
    assert len(machines) == 1, "tensor_parallel_size divides the workers of a machine"
    return Seat(machines.pop(), ",".join(seat.gpus for seat in own))


def gpus_per_node(cluster: ClusterConfig, gpus_found: int) -> int:
    """The GPUs that each machine of the run uses; 0 is a run on CPUs."""
    if cluster.gpus_per_node != "auto":
        return cluster.gpus_per_node
    return min(gpus_found, 1) if cluster.launcher == "local" else gpus_found


def count_local_gpus(device_folder: Path = Path("/dev")) -> int:
    """The NVIDIA GPUs that this process may use, found without loading a driver library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return sum(1 for p in device_folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name))


@dataclass(frozen=True)
class NodeResources:
    """What one machine of a running Ray cluster has."""

    address: str
    cpus: float
    gpus: float


def check_fits(placement: Placement, nodes: Sequence[NodeResources]) -> None:
    """Refuses a placement that these machines can not hold.

    Raises:
        ConfigError: too few machines with the CPUs or GPUs asked for.
    """
    need = placement.bundles[0]
    fitting = [n for n in nodes if n.cpus >= need["CPU"] and n.gpus >= need.get("GPU", 0)]
    if len(fitting) >= placement.num_nodes:
        return
    key = "gpus_per_node" if placement.uses_gpu else "cpu_workers_per_node"
    found = "; ".join(f"{n.address}: {n.gpus:g} GPUs, {n.cpus:g} CPUs" for n in nodes) or "none"
    raise ConfigError(
        f"cluster.num_nodes={placement.num_nodes} and cluster.{key}={placement.workers_per_node} "
        f"need {placement.num_nodes} machine(s) with {need.get('GPU', 0):g} GPUs and "
        f"{need['CPU']:g} CPUs each, but {len(fitting)} of the {len(nodes)} found can hold that "
        f"({found}). Lower these keys, or set cluster.address to a Ray cluster that has them"
    )


def worker_env(placement: Placement, env_vars: Mapping[str, str]) -> dict[str, str]:
    """The environment that workers start in; `env_vars` (of the configuration) win."""
    env = {"OMP_NUM_THREADS": str(placement.threads), "TOKENIZERS_PARALLELISM": "false"}
    if not placement.uses_gpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    env |= env_vars
    if env["OMP_NUM_THREADS"] != "1":
        # Two spinning OpenMP threads beside any busy process made training 14 times slower.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


def _check_sizes(
    cluster: ClusterConfig, sizes: ParallelSizes, per_node: int, uses_gpu: bool
) -> None:
    per_node_key = "cluster.gpus_per_node" if uses_gpu else "cluster.cpu_workers_per_node"
    world = cluster.num_nodes * per_node
    has = (
        f"cluster.num_nodes={cluster.num_nodes} x {per_node_key}={per_node} gives {world} worker(s)"
    )
    axes = (sizes.tensor, sizes.context, sizes.pipeline)
    asked = [f"{axis.key}={axis.size}" for axis in axes if axis.size > 1]
    model = sizes.tensor.size * sizes.context.size * sizes.pipeline.size
    if world % model:
        raise ConfigError(
            f"{' x '.join(asked)} needs a multiple of {model} workers, but {has}. "
            f"Raise {per_node_key} or cluster.num_nodes, or lower the parallel sizes"
        )
    if per_node % sizes.tensor.size:
        raise ConfigError(
            f"{sizes.tensor.key}={sizes.tensor.size} must divide {per_node_key}={per_node}, "
            "because tensor-parallel ranks stay on one machine"
        )
    experts = sizes.experts
    if experts and world % (experts.size * sizes.pipeline.size):
        raise ConfigError(
            f"{experts.key} = {experts.size} ranks for each of {sizes.pipeline.size} pipeline "
            f"stage(s) must divide the workers, but {has}"
        )
    num_data_parallel = world // model
    if num_data_parallel % sizes.replicate.size:
        raise ConfigError(
            f"{sizes.replicate.key}={sizes.replicate.size} must divide the {num_data_parallel} "
            f"data-parallel rank(s): {has}" + (f", shared by {' x '.join(asked)}" if asked else "")
        )
