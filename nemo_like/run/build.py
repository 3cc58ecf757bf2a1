"""From the configuration to the objects of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_like.backends.settings import BackendSettings
from nemo_like.cluster.generator import RemoteGenerator
from nemo_like.cluster.group import GroupConfig, WorkerGroup
from nemo_like.cluster.placement import (
    ParallelAxis,
    ParallelSizes,
    Placement,
    count_local_gpus,
    place,
    place_single,
    worker_env,
)
from nemo_like.cluster.policy import RemotePolicy
from nemo_like.cluster.runtime import RayCluster
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.policy import DTensorConfig, PolicyConfig
from nemo_like.config.run import ClusterConfig
from nemo_like.data.batching import Batching
from nemo_like.errors import ConfigError
from nemo_like.interfaces import Environment, Generator, Policy


@dataclass(frozen=True)
class Batchings:
    """How a policy cuts global batches, with and without gradient."""

    train: Batching
    logprob: Batching


@dataclass(frozen=True)
class EngineFactory:
    """What a worker makes an engine from: a copy of the policy's model, and its tokenizer."""

    policy: PolicyConfig
    device: str

    def __call__(self) -> Any:
        """The reference engine, without weights yet."""
        from nemo_like.assets import model_folder
        from nemo_like.backends.dtensor.model import load_hf_config
        from nemo_like.data.tokenizer import load_tokenizer
        from nemo_like.rollout.hf import HFEngine

        tokenizer = load_tokenizer(self.policy.tokenizer, self.policy.model_name)
        folder = model_folder(self.policy.model_name, with_weights=False)
        config = load_hf_config(folder, self.policy.hf_config_overrides)
        return HFEngine(
            config.to_dict(),
            lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
            device=self.device,
        )


@dataclass(frozen=True)
class Machines:
    """What trains, and what answers (if anything has to)."""

    policy: Policy
    generator: Generator | None


def policy_factory(policy: PolicyConfig, settings: BackendSettings) -> Any:
    """What each worker makes its backend from.

    Raises:
        ConfigError: the backend can not train yet.
    """
    match policy.backend:
        case DTensorConfig():
            from nemo_like.backends.dtensor.factory import DTensorFactory

            return DTensorFactory(policy, settings)
        case MegatronConfig():
            raise ConfigError(
                "policy.megatron_cfg.enabled=true: this version validates Megatron "
                "configurations and can not train with them; set policy.megatron_cfg.enabled=false "
                "policy.dtensor_cfg.enabled=true"
            )


@contextmanager
def machines(
    policy: PolicyConfig,
    cluster: ClusterConfig,
    factory: Any,
    batchings: Batchings,
    *,
    log_folder: Path,
    with_generator: bool,
) -> Iterator[Machines]:
    """Policy and generator on the machines that the configuration names; ended with the block.

    Under Ray the workers are still starting when the block begins: the first call waits for them.
    """
    if cluster.address is None:
        _check_gpus(cluster)
    if cluster.launcher == "local":
        placement = place(cluster, parallel_sizes(policy), gpus_found=count_local_gpus())
        _take_place(placement, policy.backend.env_vars)
        engine = EngineFactory(policy, placement.device) if with_generator else None
        yield from _local(factory, batchings, engine)
        return
    ray = RayCluster(cluster)
    groups: list[WorkerGroup] = []
    try:
        ray.start()
        placement = place(cluster, parallel_sizes(policy), gpus_found=ray.gpus_found())

        def group(name: str, made_by: Any, where: Any) -> WorkerGroup:
            config = GroupConfig(
                name=name,
                placement=where,
                factory=made_by,
                log_dir=log_folder / "workers",
                timeout_s=cluster.worker_timeout_s,
                env_vars=policy.backend.env_vars,
            )
            groups.append(WorkerGroup(ray, config))
            groups[-1].start()
            return groups[-1]

        remote = RemotePolicy(
            group("policy", factory, placement),
            placement,
            train=batchings.train,
            logprob=batchings.logprob,
        )
        generator = None
        if with_generator:
            generator = RemoteGenerator(
                group("generator", EngineFactory(policy, "cpu"), place_single(uses_gpu=False))
            )
        yield Machines(remote, generator)
    finally:
        for started in groups:
            started.close()
        ray.close()


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
            )


def build_environment(name: str) -> Environment:
    """The environment that judges answers.

    Raises:
        ConfigError: there is none of this name.
    """
    match name:
        case "arithmetic":
            from nemo_like.environments.arithmetic import ArithmeticEnvironment

            return ArithmeticEnvironment()
        case "math":
            from nemo_like.environments.math import MathEnvironment

            return MathEnvironment()
    raise ConfigError(f"env_name={name!r}: no such environment; there are arithmetic and math")
