"""What an engine does with its share of a GPU: weights, and a cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nemo_like.config.generation import RolloutPolicyConfig
from nemo_like.plan.devices import Device
from nemo_like.rollout.vllm_settings import kv_bytes_per_token


@dataclass(frozen=True)
class EnginePlan:
    """One GPU of an engine. Units: bytes; tokens.

    What vLLM itself takes for a forward pass and for CUDA graphs comes off `cache`: it measures
    that when it starts.
    """

    weights: float
    cache: float
    bytes_per_token: float
    sequences: float
    """Of the longest, that the cache holds at the same time."""
    asked: int
    """Sequences that are to be decoded at the same time."""
    share: float
    """Of the GPU's memory, for all of it."""


def engine_plan(
    policy: RolloutPolicyConfig, hf_config: Any, num_parameters: int, device: Device
) -> EnginePlan:
    """What each GPU of an engine of this policy holds."""
    asked = policy.generation.vllm_cfg
    itemsize = getattr(torch, asked.precision or policy.precision).itemsize
    tensor = asked.tensor_parallel_size
    per_token = kv_bytes_per_token(hf_config, itemsize, num_parts=tensor)
    weights = num_parameters * itemsize / tensor
    cache = asked.gpu_memory_utilization * device.memory - weights
    return EnginePlan(
        weights=weights,
        cache=cache,
        bytes_per_token=per_token,
        sequences=max(0.0, cache) / (per_token * policy.max_model_len),
        asked=policy.generation.max_num_seqs,
        share=asked.gpu_memory_utilization,
    )
