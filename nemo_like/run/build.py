"""From the configuration to the objects of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_like.backends.factory import BackendFactory
from nemo_like.backends.settings import BackendSettings
from nemo_like.cluster.generator import RemoteGenerator
from nemo_like.cluster.group import GroupConfig, WorkerGroup
from nemo_like.cluster.placement import (
    ParallelAxis,
    ParallelSizes,
    Placement,
    Seat,
    count_local_gpus,
    place,
    shared_seat,
    worker_env,
)
from nemo_like.cluster.policy import RemotePolicy
from nemo_like.cluster.runtime import RayCluster
from nemo_like.config.generation import RolloutPolicyConfig
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.policy import DTensorConfig, PolicyConfig
from nemo_like.config.run import ClusterConfig
from nemo_like.data.batching import Batching
from nemo_like.errors import ConfigError
from nemo_like.interfaces import Generator, Policy
from nemo_like.run.engines import EngineFactory, choose_engines
from nemo_like.run.model_config import hf_config_of


@dataclass(frozen=True)
class Batchings:
    """How a policy cuts global batches, with and without gradient."""

    train: Batching
    logprob: Batching


@dataclass(frozen=True)
class Machines:
    """What trains, and what answers (if anything has to)."""

    policy: Policy
    generator: Generator | None


def policy_factory(policy: PolicyConfig, settings: BackendSettings) -> BackendFactory:
    """What each worker makes its backend from.

    Raises:
        ConfigError: the Megatron backend can not train this model so; nothing was started.
    """
    if isinstance(policy.backend, MegatronConfig):
        from nemo_like.backends.megatron.architecture import refuse_unsupported

        refuse_unsupported(policy, hf_config_of(policy))
    return BackendFactory(policy, settings)


@contextmanager
def machines(
    policy: PolicyConfig,
    cluster: ClusterConfig,
    factory: Any,
    batchings: Batchings,
    *,
    log_folder: Path,
    with_generator: bool,
    say: Callable[[str], object],
) -> Iterator[Machines]:
    """Policy and generator on the machines that the configuration names; ended with the block.

    Under Ray workers are still starting when the block begins, and the first call waits for them;
    but a policy that shares GPUs with its engines has started.
    `say` is told of engines that are lost and replaced.
    """
    if cluster.launcher == "local":
        placement = _local_place(policy, cluster)
        engine = EngineFactory(policy, placement.device) if with_generator else None
        yield from _local(factory, batchings, engine)
        return
    with _workers(policy, cluster, log_folder) as workers:
        everything = workers.place_all()
        placement = workers.place(policy)
        remote = RemotePolicy(
            workers.start("policy", factory, placement, {}),
            placement,
            train=batchings.train,
            logprob=batchings.logprob,
        )
        if not with_generator:
            yield Machines(remote, None)
            return
        with closing(workers.engines(policy, everything, remote, say)) as generator:
            yield Machines(remote, generator)


@contextmanager
def engines_alone(
    policy: RolloutPolicyConfig,
    cluster: ClusterConfig,
    *,
    log_folder: Path,
    say: Callable[[str], object],
) -> Iterator[Generator]:
    """The engines of a configuration, where nothing trains; ended with the block."""
    if cluster.launcher == "local":
        with closing(EngineFactory(policy, _local_place(policy, cluster).device)()) as engine:
            yield engine
        return
    with (
        _workers(policy, cluster, log_folder) as workers,
        closing(workers.engines(policy, workers.place_all(), None, say)) as generator,
    ):
        yield generator


def _local_place(policy: PolicyConfig, cluster: ClusterConfig) -> Placement:
    _check_gpus(cluster)
    placement = place(cluster, parallel_sizes(policy), gpus_found=count_local_gpus())
    _take_place(placement, policy.backend.env_vars)
    return placement


@dataclass
class _Workers:
    """The groups of a run under Ray."""

    ray: RayCluster
    cluster: ClusterConfig
    log_folder: Path
    env_vars: Mapping[str, str]
    groups: list[WorkerGroup] = field(default_factory=list)

    def place(self, policy: PolicyConfig) -> Placement:
        """The policy's workers, on what its engines leave."""
        cluster = self.cluster
        if isinstance(policy, RolloutPolicyConfig):
            cluster = policy.generation.training_part(cluster)
        return place(cluster, parallel_sizes(policy), gpus_found=self.ray.gpus_found())

    def place_all(self) -> Placement:
        """One worker in every place of the run, whosever it is."""
        return place(self.cluster, ParallelSizes.single(), gpus_found=self.ray.gpus_found())

    def start(
        self,
        name: str,
        factory: Any,
        placement: Placement,
        env: Mapping[str, str],
        seat: Seat | None = None,
    ) -> WorkerGroup:
        """A group that is starting; `seat` is whose GPUs it uses, if others own them."""
        if seat is not None:
            env = {**env, "CUDA_VISIBLE_DEVICES": seat.gpus}
        config = GroupConfig(
            name=name,
            placement=placement,
            factory=factory,
            log_dir=self.log_folder / "workers",
            timeout_s=self.cluster.worker_timeout_s,
            env_vars={**env, **self.env_vars},
            machine=None if seat is None else seat.machine,
        )
        started = WorkerGroup(self.ray, config)
        self.groups.append(started)
        started.start()
        return started

    def engines(
        self,
        policy: PolicyConfig,
        everything: Placement,
        trainer: RemotePolicy | None,
        say: Callable[[str], object],
    ) -> RemoteGenerator:
        """The engines, starting; those on GPUs when the policy has taken its own."""
        kind = choose_engines(policy, everything, None if trainer is None else trainer.placement)
        seats: list[Seat] = []
        if kind.place.uses_gpu and trainer is not None:
            seats = trainer.seats()
        if kind.shares_gpus and trainer is not None:
            # vLLM measures what is free while it starts, and takes what others do for its own.
            trainer.wait_ready()

        def start(number: int) -> WorkerGroup:
            seat = shared_seat(seats, number, kind.gpus_each) if kind.shares_gpus else None
            return self.start(f"engine_{number}", kind.factory, kind.place, kind.env_vars, seat)

        generator = RemoteGenerator(
            start,
            num_engines=kind.count,
            say=say,
            transport=kind.transport,
            shares_gpus=kind.shares_gpus,
        )
        if kind.shares_gpus and trainer is not None:
            trainer.share_gpus(generator.sleep)
        return generator


@contextmanager
def _workers(policy: PolicyConfig, cluster: ClusterConfig, log_folder: Path) -> Iterator[_Workers]:
    if cluster.address is None:
        _check_gpus(cluster)
    workers = _Workers(RayCluster(cluster), cluster, log_folder, policy.backend.env_vars)
    try:
        workers.ray.start()
        yield workers
    finally:
        for started in workers.groups:
            started.close()
        workers.ray.close()


def _check_gpus(cluster: ClusterConfig) -> None:
    """Refuse to wait for, or do without, GPUs that this machine does not have."""
    asked, found = cluster.gpus_per_node, count_local_gpus()
    if asked != "auto" and asked > found:
        raise ConfigError(
            f"cluster.gpus_per_node={asked}, and this machine shows {found}; lower it (0 is a run "
            "on the CPU with cluster.cpu_workers_per_node), or set cluster.address to a Ray cluster"
        )


def _take_place(placement: Placement, env_vars: Mapping[str, str]) -> None:
    """Give this process what a worker gets before it starts: its environment and its threads."""
    import torch

    os.environ.update(worker_env(placement, env_vars))
    if not placement.uses_gpu:
        torch.set_num_threads(placement.threads)


def _local(factory: Any, batchings: Batchings, engine: EngineFactory | None) -> Iterator[Machines]:
    from nemo_like.run.local import LocalPolicy

    policy = LocalPolicy(factory(), train=batchings.train, logprob=batchings.logprob)
    try:
        yield Machines(policy, None if engine is None else engine())
    finally:
        policy.close()


def parallel_sizes(policy: PolicyConfig) -> ParallelSizes:
    """How many ranks of each kind the active backend asks for."""
    match policy.backend:
        case DTensorConfig() as config:
            return ParallelSizes.of_dtensor(config)
        case MegatronConfig() as config:
            root = "policy.megatron_cfg"
            return ParallelSizes(
                tensor=ParallelAxis(
                    config.tensor_model_parallel_size, f"{root}.tensor_model_parallel_size"
                ),
                context=ParallelAxis(config.context_parallel_size, f"{root}.context_parallel_size"),
                pipeline=ParallelAxis(
                    config.pipeline_model_parallel_size, f"{root}.pipeline_model_parallel_size"
                ),
                replicate=ParallelAxis(1, f"{root}.dp_replicate_size"),
                experts=ParallelAxis(
                    config.expert_model_parallel_size * config.expert_tensor_parallel_size,
                    f"{root}.expert_model_parallel_size x {root}.expert_tensor_parallel_size",
                ),
            )
