"""Which engines a configuration gets: how many, on what, made how, and how weights reach them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_like.cluster.placement import Placement, num_engines, place_single
from nemo_like.config.generation import GenerationConfig, RolloutPolicyConfig
from nemo_like.config.policy import PolicyConfig
from nemo_like.errors import ConfigError
from nemo_like.run.model_config import hf_config_of
from nemo_like.weight_sync.broadcast import Broadcast
from nemo_like.weight_sync.ipc import Ipc
from nemo_like.weight_sync.transport import Transport


@dataclass(frozen=True)
class EngineFactory:
    """What a worker makes an engine from: a copy of the policy's model, and its tokenizer."""

    policy: PolicyConfig
    device: str
    sleeps: bool = False

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
        return _rollout_engine(policy, config, decode, self)


def _rollout_engine(
    policy: RolloutPolicyConfig, config: dict[str, Any], decode: Any, factory: EngineFactory
) -> Any:
    import torch

    generation = policy.generation
    sizes = {"max_model_len": policy.max_model_len, "max_num_seqs": generation.max_num_seqs}
    match generation.backend:
        case "vllm":
            from nemo_like.rollout.vllm import VLLMEngine
            from nemo_like.rollout.vllm_settings import OnCpu, OnGpus

            asked = generation.vllm_cfg
            on_gpus = OnGpus(
                asked.gpu_memory_utilization,
                eager=asked.enforce_eager,
                sleeps=factory.sleeps,
                num_parts=asked.tensor_parallel_size,
            )
            where = OnCpu() if factory.device == "cpu" else on_gpus
            dtype = getattr(torch, asked.precision or policy.precision)
            return VLLMEngine(config, decode, dtype=dtype, where=where, **sizes)
        case "hf":
            from nemo_like.rollout.hf import HFEngine

            dtype = getattr(torch, policy.precision)
            return HFEngine(config, decode, dtype=dtype, device=factory.device, **sizes)


@dataclass(frozen=True)
class Engines:
    """The engines of a run: how many, each made from what and where, in which environment.

    `shares_gpus`: they have the GPUs of the policy's workers, in their order, and sleep while those
    work.
    """

    factory: EngineFactory
    place: Placement
    count: int = 1
    gpus_each: int = 1
    env_vars: Mapping[str, str] = field(default_factory=dict)
    transport: Transport | None = None
    shares_gpus: bool = False


def choose_engines(
    policy: PolicyConfig, everything: Placement, trainer: Placement | None
) -> Engines:
    """The engines of a run.

    Args:
        policy: Whose copies they hold.
        everything: One worker on every GPU (or CPU part) of the run.
        trainer: The workers of the policy among them; None is that nothing trains.

    Raises:
        ConfigError: engines that were not built, or that do not come out even.
    """
    on_cpu = place_single(uses_gpu=False, threads=everything.threads)
    if not isinstance(policy, RolloutPolicyConfig):
        return Engines(EngineFactory(policy, "cpu"), on_cpu)
    generation = policy.generation
    on_gpu = everything.uses_gpu and generation.backend == "vllm"
    shares = on_gpu and trainer is not None and generation.colocated.enabled
    transport = choose_transport(generation, on_gpu=on_gpu, policy_on_gpu=everything.uses_gpu)
    if not on_gpu:
        count, environment = generation.num_cpu_engines, {}
        if generation.backend == "vllm":
            from nemo_like.rollout.vllm_settings import ENVIRONMENT

            environment = ENVIRONMENT
        factory = EngineFactory(policy, "cpu")
        return Engines(factory, on_cpu, count, env_vars=environment, transport=transport)
    from nemo_like.rollout.vllm_settings import GPU_ENVIRONMENT

    size = generation.vllm_cfg.tensor_parallel_size
    own = everything.world_size - (0 if shares or trainer is None else trainer.world_size)
    return Engines(
        EngineFactory(policy, everything.device, sleeps=shares),
        place_single(uses_gpu=True, threads=everything.threads, gpus=0 if shares else size),
        num_engines(own, size, per_node=everything.workers_per_node),
        size,
        GPU_ENVIRONMENT,
        transport,
        shares,
    )


def choose_transport(
    generation: GenerationConfig, *, on_gpu: bool, policy_on_gpu: bool
) -> Transport | None:
    """The direct way for weights that was asked for, or that fits best; None is the object store.

    Raises:
        ConfigError: the engines are elsewhere.
    """
    asked = generation.refit_transport
    if asked in ("ipc", "broadcast") and policy_on_gpu and not on_gpu:
        raise ConfigError(
            f"policy.generation.refit_transport={asked}: the policy is on GPUs and the engines are "
            "on CPUs: leave it out, or set object_store"
        )
    if asked is None and on_gpu and generation.vllm_cfg.tensor_parallel_size == 1:
        asked = "ipc" if generation.colocated.enabled else "broadcast"
    ways: dict[str | None, Transport] = {"ipc": Ipc(), "broadcast": Broadcast()}
    return ways.get(asked)
