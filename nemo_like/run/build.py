"""From the configuration to the objects of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from nemo_like.config.generation import RolloutPolicyConfig
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.policy import DTensorConfig, PolicyConfig
from nemo_like.config.run import ClusterConfig
from nemo_like.data.batching import Batching
from nemo_like.errors import ConfigError
from nemo_like.interfaces import Generator, Policy


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
        """An engine without weights yet; the reference engine, where none is asked for."""
        from nemo_like.assets import model_folder
        from nemo_like.backends.dtensor.model import load_hf_config
        from nemo_like.data.tokenizer import load_tokenizer

        policy = self.policy
        tokenizer = load_tokenizer(policy.tokenizer, policy.model_name)
        folder = model_folder(policy.model_name, with_weights=False)
        config = load_hf_config(folder, policy.hf_config_overrides).to_dict()

        def decode(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids), skip_special_tokens=True))

        if not isinstance(policy, RolloutPolicyConfig):
            from nemo_like.rollout.hf import HFEngine

            return HFEngine(config, decode, device=self.device)
        return _rollout_engine(policy, config, decode, self.device)


def _rollout_engine(
    policy: RolloutPolicyConfig, config: dict[str, Any], decode: Any, device: str
) -> Any:
    import torch

    generation = policy.generation
    precision = generation.vllm_cfg.precision or policy.precision
    sizes = {"max_model_len": policy.max_model_len, "max_num_seqs": generation.max_num_seqs}
    match generation.backend:
        case "vllm":
            from nemo_like.rollout.vllm import VLLMEngine

            return VLLMEngine(config, decode, dtype=getattr(torch, precision), **sizes)
        case "hf":
            from nemo_like.rollout.hf import HFEngine

            dtype = getattr(torch, policy.precision)
            return HFEngine(config, decode, dtype=dtype, device=device, **sizes)


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
    say: Callable[[str], object],
) -> Iterator[Machines]:
    """Policy and generator on the machines that the configuration names; ended with the block.

    Under Ray the workers are still starting when the block begins: the first call waits for them.
    `say` is told of engines that are lost and replaced.
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
    generator: RemoteGenerator | None = None
    try:
        ray.start()
        placement = place(cluster, parallel_sizes(policy), gpus_found=ray.gpus_found())

        def group(name: str, made_by: Any, where: Any, env: Mapping[str, str]) -> WorkerGroup:
            config = GroupConfig(
                name=name,
                placement=where,
                factory=made_by,
                log_dir=log_folder / "workers",
                timeout_s=cluster.worker_timeout_s,
                env_vars={**env, **policy.backend.env_vars},
            )
            started = WorkerGroup(ray, config)
            groups.append(started)
            started.start()
            return started

        remote = RemotePolicy(
            group("policy", factory, placement, {}),
            placement,
            train=batchings.train,
            logprob=batchings.logprob,
        )
        if with_generator:
            kind = choose_engines(policy, placement)
            where = place_single(uses_gpu=False, threads=cluster.cpu_threads_per_worker)
            generator = RemoteGenerator(
                lambda number: group(f"engine_{number}", kind.factory, where, kind.env_vars),
                num_engines=kind.count,
                say=say,
            )
        yield Machines(remote, generator)
    finally:
        if generator is not None:
            generator.close()
        for started in groups:
            started.close()
        ray.close()


@dataclass(frozen=True)
class Engines:
    """The engines of a run: how many, made from what, in which environment."""

    factory: EngineFactory
    count: int = 1
    env_vars: Mapping[str, str] = field(default_factory=dict)


def choose_engines(policy: PolicyConfig, placement: Placement) -> Engines:
    """The engines of a run, all of them on CPUs.

    Raises:
        ConfigError: engines on GPUs, or weights that travel between GPUs.
    """
    factory = EngineFactory(policy, "cpu")
    if not isinstance(policy, RolloutPolicyConfig):
        return Engines(factory)
    generation = policy.generation
    if generation.refit_transport not in (None, "object_store"):
        raise ConfigError(
            f"policy.generation.refit_transport={generation.refit_transport} is between GPUs, and "
            "this version's engines run on CPUs: leave it out, or set object_store"
        )
    if generation.backend == "hf":
        return Engines(factory, generation.num_cpu_engines)
    if placement.uses_gpu:
        raise ConfigError(
            "policy.generation.backend=vllm: this version's vLLM engines run on CPUs, and were "
            "never tried on a GPU. Set cluster.gpus_per_node=0, or policy.generation.backend=hf"
        )
    from nemo_like.rollout.vllm import ENVIRONMENT

    return Engines(factory, generation.num_cpu_engines, ENVIRONMENT)


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
