"""Rollouts: the engine, how it samples, where it lives, and how weights reach it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from nemo_like.config.base import Conflict, Node, Positive, PositiveFloat
from nemo_like.config.policy import PolicyConfig, Precision
from nemo_like.config.run import ClusterConfig

Share = Annotated[float, Field(gt=0, le=1)]


class VLLMConfig(Node):
    """vLLM's engine."""

    precision: Precision | None = None
    """Type of weights and computation; null is `policy.precision`."""
    tensor_parallel_size: Positive = 1
    """GPUs that share each matrix of an engine."""
    gpu_memory_utilization: Share = 0.6
    """Share of a GPU's memory that an engine takes."""
    max_model_len: Positive | None = None
    """Longest sequence, prompt and response; null is `policy.max_total_sequence_length`."""
    enforce_eager: bool = False
    """Without CUDA graphs and compilation: a faster start, slower tokens."""


class ResourcesConfig(Node):
    """The GPUs of engines that do not share the policy's."""

    num_nodes: Positive | None = None
    """Of several machines: this many are the engines', whole."""
    gpus_per_node: Positive | None = None
    """Of one machine: this many of its GPUs are the engines'."""


class ColocatedConfig(Node):
    """Whether policy and engines share GPUs."""

    enabled: bool = True
    """Share them: engines sleep while the policy trains. On a CPU there is nothing to share."""
    resources: ResourcesConfig = ResourcesConfig()
    """The engines' part of the cluster under `enabled=false`."""


class MismatchConfig(Node):
    """How far an engine may be from the policy whose weights it was given."""

    max_token_mult_prob_error: Annotated[float, Field(gt=1)] = 1.1
    """Mean over a step's tokens of exp |log-probability of the engine - of the policy|."""
    action: Literal["stop", "warn"] = "stop"
    """What happens above it; `stop` is before the weights change, drawn ahead it is after."""

    @property
    def limit(self) -> float | None:
        """The error above which no step is taken; None where it is only told."""
        return self.max_token_mult_prob_error if self.action == "stop" else None


class GenerationConfig(Node):
    """How rollouts are drawn."""

    backend: Literal["vllm", "hf"] = "vllm"
    """`vllm`, or `hf`: a small engine that needs nothing but transformers."""
    max_new_tokens: Positive | None = None
    """Longest response; null is what a sequence has room for."""
    temperature: PositiveFloat = 1.0
    """Of training and of samples in validation; the first answer there is greedy."""
    top_p: Share = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: Positive | None = None
    """Draw from this many tokens; null is all."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a response; null is the end-of-sequence token."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response."""
    max_num_seqs: Positive = 256
    """Sequences that an engine decodes at the same time."""
    num_cpu_engines: Positive = 1
    """Engines of a cluster without GPUs; on GPUs their number follows from their size."""
    refit_transport: Literal["object_store", "ipc", "broadcast"] | None = None
    """How weights reach the engines: `object_store` through Ray; `ipc` by memory that policy and
    engine share, of their GPU or machine; `broadcast` by NCCL or gloo, to engines on GPUs of their
    own or on CPUs. Null is `ipc` or `broadcast` between GPUs, else `object_store`."""
    vllm_cfg: VLLMConfig = VLLMConfig()
    """vLLM's engine."""
    colocated: ColocatedConfig = ColocatedConfig()
    """Whether policy and engines share GPUs."""
    mismatch: MismatchConfig = MismatchConfig()
    """How far an engine may be from the policy."""

    def conflicts(self) -> Iterator[Conflict]:
        """What this engine or this placement does not have."""
        if "" in self.stop_strings:
            yield Conflict(("stop_strings",), "an empty text would end every response at once")

    def training_part(self, cluster: ClusterConfig) -> ClusterConfig:
        """The machines that are left for the policy, if `placement_conflicts` finds none."""
        own = self.colocated.resources
        if self.colocated.enabled or not isinstance(cluster.gpus_per_node, int):
            return cluster
        left = (
            {"num_nodes": cluster.num_nodes - (own.num_nodes or 0)}
            if cluster.num_nodes > 1
            else {"gpus_per_node": cluster.gpus_per_node - (own.gpus_per_node or 0)}
        )
        return cluster.model_copy(update=left)

    def placement_conflicts(self, cluster: ClusterConfig) -> Iterator[Conflict]:
        """Engines that this cluster has no room for; keys are those of a whole tree."""
        generation = "policy.generation"
        tensor = f"{generation}.vllm_cfg.tensor_parallel_size"
        if cluster.launcher == "local":
            if self.backend == "vllm":
                yield Conflict(
                    (f"{generation}.backend", "cluster.launcher"), "vLLM engines are Ray actors"
                )
            if self.num_cpu_engines > 1:
                yield Conflict(
                    (f"{generation}.num_cpu_engines", "cluster.launcher"), "`local` is one process"
                )
            if self.refit_transport is not None:
                yield Conflict(
                    (f"{generation}.refit_transport", "cluster.launcher"),
                    "`local` is one process: nothing travels",
                )
        elif cluster.gpus_per_node == 0:
            given = self.colocated.resources.model_dump(exclude_none=True)
            for key in (f"{generation}.colocated.resources.{name}" for name in given):
                yield Conflict((key, "cluster.gpus_per_node"), "there are no GPUs to share out")
            if self.refit_transport == "ipc" and cluster.num_nodes > 1:
                yield Conflict(
                    (f"{generation}.refit_transport", "cluster.num_nodes"),
                    "machines share no memory: leave it out, or set broadcast",
                )
            if self.vllm_cfg.tensor_parallel_size > 1:
                yield Conflict((tensor, "cluster.gpus_per_node"), "engines on a CPU are whole")
        elif isinstance(cluster.gpus_per_node, int):
            if self.num_cpu_engines > 1:
                yield Conflict(
                    (f"{generation}.num_cpu_engines", "cluster.gpus_per_node"),
                    "on GPUs the number of engines follows from their size: leave it out",
                )
            yield from self._direct_conflicts(generation)
            yield from self._gpu_conflicts(cluster, cluster.gpus_per_node, tensor)

    def _direct_conflicts(self, generation: str) -> Iterator[Conflict]:
        """What a direct transport asks of engines beside a policy on GPUs."""
        transport, key = self.refit_transport, f"{generation}.refit_transport"
        if transport in (None, "object_store"):
            return
        if self.backend == "hf":
            yield Conflict((key, f"{generation}.backend"), "these engines stay on CPUs")
        elif (transport == "ipc") is not self.colocated.enabled:
            yield Conflict(
                (key, f"{generation}.colocated.enabled"),
                "ipc is between processes that share a GPU, broadcast between those that do not",
            )
        elif self.vllm_cfg.tensor_parallel_size > 1:
            yield Conflict(
                (key, f"{generation}.vllm_cfg.tensor_parallel_size"),
                "an engine of several GPUs takes its weights through the object_store",
            )

    def _gpu_conflicts(
        self, cluster: ClusterConfig, num_gpus: int, tensor: str
    ) -> Iterator[Conflict]:
        """GPUs of the engines: all of them, whole machines of several, or some of one."""
        colocated, own = "policy.generation.colocated", self.colocated.resources
        if cluster.num_nodes > 1:
            name, given, total = "num_nodes", own.num_nodes, cluster.num_nodes
            other_fits = own.gpus_per_node in (None, num_gpus)
        else:
            name, given, total = "gpus_per_node", own.gpus_per_node, num_gpus
            other_fits = own.num_nodes in (None, 1)
        if self.colocated.enabled:
            for key in own.model_dump(exclude_none=True):
                yield Conflict(
                    (f"{colocated}.resources.{key}", f"{colocated}.enabled"),
                    "engines that share the policy's GPUs have none of their own",
                )
        elif given is None or given >= total or not other_fits:
            yield Conflict(
                (f"{colocated}.enabled", f"{colocated}.resources.{name}", f"cluster.{name}"),
                f"set resources.{name} to the engines' part of the {total}, fewer than all, and "
                "leave the other resource out",
            )
            return
        engine = self.vllm_cfg.tensor_parallel_size
        within = num_gpus
        if not self.colocated.enabled and cluster.num_nodes == 1:
            within = own.gpus_per_node or num_gpus
        if within % engine:
            yield Conflict(
                (tensor, "cluster.gpus_per_node"),
                f"an engine of {engine} GPUs must fit into the {within} of one machine",
            )


class RolloutPolicyConfig(PolicyConfig):
    """The model in training, which also draws its own data."""

    train_global_batch_size: Positive = 512
    """Sequences of one optimizer step; a step's rollouts are one or several such batches."""
    sft_config: str | None = None
    """A supervised run's file: begin with its last weights, after training them if need be."""
    generation: GenerationConfig = GenerationConfig()
    """How rollouts are drawn."""

    @property
    def max_new_tokens(self) -> int:
        """The longest response, where the prompt leaves room for it."""
        return self.generation.max_new_tokens or self.max_model_len

    @property
    def max_model_len(self) -> int:
        """The longest sequence that an engine draws, prompt and response."""
        of_vllm = self.generation.vllm_cfg.max_model_len
        if self.generation.backend == "vllm" and of_vllm is not None:
            return of_vllm
        return self.max_total_sequence_length

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between the blocks of the policy."""
        yield from super().conflicts()
        total, engine = "max_total_sequence_length", "generation.vllm_cfg.max_model_len"
        if self.max_model_len > self.max_total_sequence_length:
            yield Conflict((engine, total), "a rollout must fit into a training sequence")
        elif self.max_new_tokens > self.max_model_len:
            limit = total if self.max_model_len == self.max_total_sequence_length else engine
            yield Conflict(
                ("generation.max_new_tokens", limit), "a response can not be longer than a sequence"
            )
        if self.sft_config is not None and self.init == "random":
            yield Conflict(
                ("sft_config", "init"), "the weights are either the supervised run's or newborn"
            )
