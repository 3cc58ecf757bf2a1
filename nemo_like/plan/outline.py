"""The whole forecast of a run on a device: memory, traffic, work, and what it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_like.cluster.placement import Placement
from nemo_like.config.generation import RolloutPolicyConfig
from nemo_like.config.policy import DTensorConfig, PolicyConfig
from nemo_like.config.tree import RunTree
from nemo_like.optim.build import muon_rule
from nemo_like.optim.plan import Plan
from nemo_like.plan.devices import Device
from nemo_like.plan.engines import EnginePlan, engine_plan
from nemo_like.plan.rehearsal import MASTERS, STATE, WEIGHTS, Rehearsed, Work, rehearse
from nemo_like.plan.watch import ACTIVATIONS, GRADIENTS, LOGITS, OPTIMIZER, TEMPORARY, Message
from nemo_like.run.model_config import hf_config_of

AT_REST = (WEIGHTS, MASTERS, STATE)
"""Kinds that a rank holds between steps."""


@dataclass(frozen=True)
class Outline:
    """What was found. `ranks` are those that differ: the ends of a pipeline, and its fullest stage.

    `other` is the fullest rank's activations under the other setting of activation checkpointing.
    """

    device: Device
    placement: Placement
    work: Work
    ranks: Mapping[int, Rehearsed]
    other: Mapping[str, float]
    recomputes: bool
    backend_key: str
    num_parameters: int
    exchange_bytes: float
    exchange_buffer: float
    newton_schulz_flops: float
    engine: EnginePlan | None
    shares_gpus: bool

    @property
    def fullest(self) -> int:
        """The rank whose fullest moment is the fullest."""
        return max(self.ranks, key=lambda rank: sum(self.ranks[rank].peak.values()))

    @property
    def peak(self) -> float:
        """Bytes of tensors at the fullest moment of the fullest rank."""
        return sum(self.ranks[self.fullest].peak.values())

    @property
    def resting(self) -> float:
        """Bytes that the fullest rank holds between steps, while engines draw."""
        after = self.ranks[self.fullest].after_forward
        return sum(after.get(kind, 0) for kind in AT_REST)

    def misfits(self) -> Iterator[str]:
        """What does not fit into the device, with the keys to change."""
        room = self.device.memory
        if self.peak > room:
            yield (
                f"a rank needs {self.peak / 1e9:,.1f} GB, and the device has {room / 1e9:,.0f}: "
                f"{self._advice()}"
            )
        engine = self.engine
        if engine is None:
            return
        block = "policy.generation.vllm_cfg"
        if engine.sequences < 1:
            yield (
                f"an engine's {engine.share:.0%} of a GPU hold "
                f"{max(0, engine.cache) / 1e9:,.1f} GB of keys and values beside "
                f"{engine.weights / 1e9:,.1f} GB of weights, less than one longest sequence: raise "
                f"{block}.gpu_memory_utilization or {block}.tensor_parallel_size, or lower "
                f"{block}.max_model_len"
            )
        together = self.resting + engine.share * room
        if self.shares_gpus and together > room:
            yield (
                f"engine and policy share a GPU: {engine.share:.0%} of it and the policy's "
                f"{self.resting / 1e9:,.1f} GB at rest are more than {room / 1e9:,.0f} GB: lower "
                f"{block}.gpu_memory_utilization, or set policy.generation.colocated.enabled=false"
            )

    def _advice(self) -> str:
        """The key that lowers the largest kind."""
        peak = self.ranks[self.fullest].peak
        largest = max(peak, key=lambda kind: peak[kind])
        if largest in (ACTIVATIONS, TEMPORARY) and not self.recomputes:
            return f"set policy.{self.backend_key}.activation_checkpointing=true"
        smaller = "lower the tokens of a micro-batch, or raise tensor or context parallelism"
        cures = {
            LOGITS: "lower policy.logprob_chunk_size",
            ACTIVATIONS: smaller,
            TEMPORARY: smaller,
        }
        return cures.get(
            largest, "raise cluster.num_nodes, tensor or pipeline parallelism, or share state out"
        )

    def seconds(self) -> dict[str, float]:
        """The least time of each part of an optimizer step, of the busiest of these ranks."""
        return max((self._seconds_of(rank) for rank in self.ranks), key=lambda s: sum(s.values()))

    def _seconds_of(self, rank: int) -> dict[str, float]:
        found, device = self.ranks[rank], self.device
        flops = sum(n for part, n in found.flops.items() if part != OPTIMIZER)
        seconds = {"forward and backward": flops / device.flops}
        for message, amount in found.sent.items():
            if message.part == OPTIMIZER and message.sort == "all-to-all":
                continue  # of a few layers; the plan knows about all of them
            name = f"{message.sort} ({group_name(message)})"
            seconds[name] = seconds.get(name, 0) + amount / self.rate(message.ranks)
        if self.exchange_bytes:
            seconds["Newton-Schulz"] = self.newton_schulz_flops / device.flops
            everyone = tuple(place.rank for place in self.placement.ranks)
            seconds["Muon's exchange"] = self.exchange_bytes / self.rate(everyone)
        held = found.after_forward
        moved = held.get(GRADIENTS, 0) + 2 * sum(held.get(kind, 0) for kind in AT_REST)
        seconds["optimizer, read and write"] = moved / device.memory_rate
        stages = 1 + max(place.pipeline for place in self.placement.ranks)
        if stages > 1:  # what a stage waits while the pipeline fills and empties
            idle = (stages - 1) / self.work.num_micro_batches
            seconds["waiting for other stages"] = idle * seconds["forward and backward"]
        return {name: value for name, value in seconds.items() if value > 0}

    def rate(self, ranks: tuple[int, ...]) -> float:
        """Bytes per second between these ranks: of one machine, or of several."""
        nodes = {self.placement.ranks[rank].node for rank in ranks}
        return self.device.link if len(nodes) == 1 else self.device.network


NAMES = {
    "mesh_tp": "tensor",
    "mesh_dp_shard": "data, shards",
    "mesh_dp_replicate": "data, copies",
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "CONTEXT_PARALLEL_GROUP": "context",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data and context",
    "EXPERT_MODEL_PARALLEL_GROUP": "experts",
    "EXPERT_TENSOR_PARALLEL_GROUP": "experts, tensor",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "experts and tensor",
    "EXPERT_DATA_PARALLEL_GROUP": "experts, data",
    "EMBEDDING_GROUP": "tied embedding",
    "default_pg": "all ranks",
}


def group_name(message: Message) -> str:
    """The ranks of a message in words."""
    return NAMES.get(message.group, message.group)


def outline(
    tree: RunTree, placement: Placement, device: Device, plans: list[Plan], num_parameters: int
) -> Outline:
    """The forecast of a run. `plans` are Muon's; `num_parameters` are those of the model."""
    policy = tree.policy
    work = Work.of(policy, placement.num_data_parallel)
    counts = _layers_of_stages(policy)
    per_stage = placement.world_size // len(counts)
    ranks = {
        stage * per_stage: rehearse(
            policy,
            placement.world_size,
            stage * per_stage,
            work,
            layers=counts[stage],
            stages_behind=len(counts) - 1 - stage,
        )
        for stage in _telling_stages(counts)
    }
    found = Outline(
        device=device,
        placement=placement,
        work=work,
        ranks=ranks,
        other={},
        recomputes=policy.backend.activation_checkpointing,
        backend_key=policy.backend_key,
        num_parameters=num_parameters,
        **_muon(policy, plans),
        engine=_engine(policy, num_parameters, device),
        shares_gpus=isinstance(policy, RolloutPolicyConfig) and policy.generation.colocated.enabled,
    )
    stage = found.fullest // per_stage
    other = rehearse(
        _flipped(policy),
        placement.world_size,
        found.fullest,
        work,
        layers=counts[stage],
        stages_behind=len(counts) - 1 - stage,
    )
    return replace(found, other=other.after_forward)


def _layers_of_stages(policy: PolicyConfig) -> tuple[int, ...]:
    layers = hf_config_of(policy).num_hidden_layers
    if isinstance(policy.backend, DTensorConfig):
        return (layers,)
    from nemo_like.backends.megatron.places import layers_of_stages

    return layers_of_stages(policy.backend, layers)


def _telling_stages(counts: tuple[int, ...]) -> list[int]:
    """The first stage, the last, and the second where it has more layers than the first."""
    last = len(counts) - 1
    second = [1] if last > 1 and counts[1] > counts[0] else []
    return sorted({0, *second, last})


def _flipped(policy: PolicyConfig) -> PolicyConfig:
    """The same with the other setting of activation checkpointing."""
    key, backend = policy.backend_key, policy.backend
    other: dict[str, Any] = {"activation_checkpointing": not backend.activation_checkpointing}
    if key == "megatron_cfg" and not other["activation_checkpointing"]:
        other["recompute_modules"] = None
    return policy.model_copy(update={key: backend.model_copy(update=other)})


def _muon(policy: PolicyConfig, plans: list[Plan]) -> dict[str, float]:
    """What Muon's busiest rank sends, buffers and computes."""
    loads: dict[int, float] = {}
    sent: dict[int, float] = {}
    buffers = [0.0]
    if plans:
        itemsize = muon_rule(policy.active_optimizer).wire(torch.float32).itemsize
    for plan in plans:
        # A bucket is on its way here while another one is computed, and a third on its way back.
        buffers.append(2 * sum(sorted(plan.sent, reverse=True)[:2]) * itemsize)
        for rank in plan.ranks:
            loads[rank] = loads.get(rank, 0) + plan.loads[rank]
            sent[rank] = sent.get(rank, 0) + sum(plan.sent) * itemsize
    return {
        "exchange_bytes": max(sent.values(), default=0.0),
        "exchange_buffer": max(buffers),
        "newton_schulz_flops": max(loads.values(), default=0.0),
    }


def _engine(policy: PolicyConfig, num_parameters: int, device: Device) -> EnginePlan | None:
    is_vllm = isinstance(policy, RolloutPolicyConfig) and policy.generation.backend == "vllm"
    if not is_vllm:
        return None
    assert isinstance(policy, RolloutPolicyConfig)
    return engine_plan(policy, hf_config_of(policy), num_parameters, device)
