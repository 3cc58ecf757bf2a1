"""From the configuration to the objects of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
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
from nemo_like.config.generation import GenerationConfig, RolloutPolicyConfig
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.policy import DTensorConfig, PolicyConfig
from nemo_like.config.run import ClusterConfig
from nemo_like.data.batching import Batching
from nemo_like.errors import ConfigError
from nemo_like.interfaces import Generator, Policy
from nemo_like.weight_sync.broadcast import Broadcast
from nemo_like.weight_sync.ipc import Ipc
from nemo_like.weight_sync.transport import Transport


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
        from nemo_like.data.tokenizer import load_tokenizer

        policy = self.policy
        tokenizer = load_tokenizer(policy.tokenizer, policy.model_name)
        config = hf_config_of(policy).to_dict()

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


def hf_config_of(policy: PolicyConfig) -> Any:
    """The configuration of the policy's model, as `transformers` reads it; needs no weights.

    Raises:
        ConfigError: there is none, or the active backend does not train it.
    """
    from nemo_like.assets import model_folder
    from nemo_like.backends.hf_models import load_hf_config

    folder = model_folder(policy.model_name, with_weights=False)
    return load_hf_config(folder, policy.hf_config_overrides, backend_key=policy.backend_key)


def policy_factory(policy: PolicyConfig, settings: BackendSettings) -> Any:
    """What each worker makes its backend from.

    Raises:
        ConfigError: the Megatron backend can not train this model so; nothing was started.
    """
    match policy.backend:
        case DTensorConfig():
            from nemo_like.backends.dtensor.factory import DTensorFactory

            return DTensorFactory(policy, settings)
        case MegatronConfig():
            from nemo_like.backends.megatron.architecture import refuse_unsupported
            from nemo_like.backends.megatron.factory import MegatronFactory

            refuse_unsupported(policy, hf_config_of(policy))
            return MegatronFactory(policy, settings)


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
    if cluster.launcher == "local":
        placement = _local_place(policy, cluster)
        engine = EngineFactory(policy, placement.device) if with_generator else None
        yield from _local(factory, batchings, engine)
        return
    with _workers(policy, cluster, log_folder) as workers:
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
        with closing(workers.engines(policy, placement, say)) as generator:
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
        closing(workers.engines(policy, workers.place(policy), say)) as generator,
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
        return place(self.cluster, parallel_sizes(policy), gpus_found=self.ray.gpus_found())

    def start(
        self, name: str, factory: Any, placement: Placement, env: Mapping[str, str]
    ) -> WorkerGroup:
        config = GroupConfig(
            name=name,
            placement=placement,
            factory=factory,
            log_dir=self.log_folder / "workers",
            timeout_s=self.cluster.worker_timeout_s,
            env_vars={**env, **self.env_vars},
        )
        started = WorkerGroup(self.ray, config)
        self.groups.append(started)
        started.start()
        return started

    def engines(
        self, policy: PolicyConfig, placement: Placement, say: Callable[[str], object]
    ) -> RemoteGenerator:
        kind = choose_engines(policy, placement)
        where = place_single(uses_gpu=False, threads=self.cluster.cpu_threads_per_worker)
        return RemoteGenerator(
            lambda number: self.start(f"engine_{number}", kind.factory, where, kind.env_vars),
            num_engines=kind.count,
            say=say,
            transport=kind.transport,
        )


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


@dataclass(frozen=True)
class Engines:
    """The engines of a run: how many, made from what, in which environment."""

    factory: EngineFactory
    count: int = 1
    env_vars: Mapping[str, str] = field(default_factory=dict)
    transport: Transport | None = None


def choose_engines(policy: PolicyConfig, placement: Placement) -> Engines:
    """The engines of a run, all of them on CPUs.

    Raises:
        ConfigError: engines on GPUs, or weights that travel between GPUs.
    """
    factory = EngineFactory(policy, "cpu")
    if not isinstance(policy, RolloutPolicyConfig):
        return Engines(factory)
    generation = policy.generation
    transport = choose_transport(generation, placement)
    if generation.backend == "hf":
        return Engines(factory, generation.num_cpu_engines, transport=transport)
    if placement.uses_gpu:
        raise ConfigError(
            "policy.generation.backend=vllm: this version's vLLM engines run on CPUs, and were "
            "never tried on a GPU. Set cluster.gpus_per_node=0, or policy.generation.backend=hf"
        )
    from nemo_like.rollout.vllm import ENVIRONMENT

    return Engines(factory, generation.num_cpu_engines, ENVIRONMENT, transport)


def choose_transport(generation: GenerationConfig, placement: Placement) -> Transport | None:
    """The direct way for weights that was asked for, or that fits best; None is the object store.

    Raises:
        ConfigError: the engines are elsewhere.
    """
    asked = generation.refit_transport
    if asked in (None, "object_store"):
        return None
    if placement.uses_gpu:
        raise ConfigError(
            f"policy.generation.refit_transport={asked}: the policy is on GPUs and the engines are "
            "on CPUs: leave it out, or set object_store"
        )
    return Ipc() if asked == "ipc" else Broadcast()


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
