"""What vLLM is started with, on CPUs and on GPUs, and what it would compute wrongly.

Source: vLLM 0.32, `EngineArgs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from nemo_like.errors import ConfigError
from nemo_like.optim.views import attention_shape
from nemo_like.rollout import vllm_extension

_EVERYWHERE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in this process, and so are its weights
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",  # it would send some over the network
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # of the parts, if there are several
}
ENVIRONMENT = _EVERYWHERE | {
    "TORCH_COMPILE_DISABLE": "1",  # of one small function, for seconds, with a C++ compiler
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # parts would each ask for a NUMA node of their own
}
"""What vLLM must find in its process's environment, from the start, on CPUs."""
GPU_ENVIRONMENT = _EVERYWHERE | {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # a CPU has the first only, and that is what tests compare
}
"""The same on GPUs."""

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Model types whose log-probabilities and updates were compared with those of transformers."""

BLOCK_TOKENS = 128
"""Tokens of a block of the KV cache on a CPU."""
KV_CACHE_BYTES = 1 << 30
"""The most that the KV cache of an engine on a CPU takes, unless one sequence needs more."""
PREFILL_TOKENS = 8192
"""Tokens of prompts that go through the model together."""


@dataclass(frozen=True)
class OnGpus:
    """An engine on GPUs, all that its process sees.

    Args:
        memory_share: Of each GPU, for weights, KV cache and the rest.
        eager: Without CUDA graphs and compilation.
        sleeps: Whether its memory can be given to others.
        num_parts: Of each matrix, and so GPUs.
    """

    environment = GPU_ENVIRONMENT

    memory_share: float
    eager: bool = False
    sleeps: bool = False
    num_parts: int = 1

    def arguments(
        self, config: Any, dtype: torch.dtype, longest: int, max_num_seqs: int
    ) -> dict[str, Any]:
        """Those of vLLM that say the same, whatever the model."""
        return {
            "gpu_memory_utilization": self.memory_share,
            "enforce_eager": self.eager,
            "enable_sleep_mode": self.sleeps,
            **_parts(self.num_parts),
            "async_scheduling": False,  # as on CPUs: when a step returns, nothing runs any more
        }


@dataclass(frozen=True)
class OnCpu:
    """An engine on CPUs.

    Args:
        kv_cache_bytes: None is what `max_num_seqs` longest sequences need, up to 1 GiB. With less,
            some sequences wait.
        sleeps: Whether it can sleep; there is no memory to give to others, so only its weights are
            taken for gone.
        num_parts: Of each matrix, and so processes.
    """

    environment = ENVIRONMENT

    kv_cache_bytes: int | None = None
    sleeps: bool = False
    num_parts: int = 1

    def arguments(
        self, config: Any, dtype: torch.dtype, longest: int, max_num_seqs: int
    ) -> dict[str, Any]:
        """Those of vLLM that say the same."""
        room = self.kv_cache_bytes
        if room is None:
            room = _kv_cache_bytes(config, dtype, longest, max_num_seqs)
        return {
            **_parts(self.num_parts),
            "enforce_eager": True,
            "block_size": BLOCK_TOKENS,
            "kv_cache_memory_bytes": room,
        }


def _parts(count: int) -> dict[str, Any]:
    if count == 1:
        return {"tensor_parallel_size": 1, "distributed_executor_backend": "uni"}
    return {
        "tensor_parallel_size": count,
        "distributed_executor_backend": "mp",
        "worker_extension_cls": vllm_extension.NAME,
    }


def check_build(where: OnCpu | OnGpus) -> None:
    """Refuses the other one of vLLM's two builds.

    Raises:
        ConfigError: it is the installed one, or sees no GPU.
    """
    platform = import_module("vllm.platforms").current_platform
    wanted, extra = ("GPUs", "vllm") if isinstance(where, OnGpus) else ("CPUs", "vllm-cpu")
    fits = platform.is_cuda() if isinstance(where, OnGpus) else platform.is_cpu()
    if not fits:
        raise ConfigError(
            f"policy.generation.backend=vllm: this engine is to run on {wanted}, and the vLLM that "
            f"is installed works on {platform.device_type or 'nothing here'}. Run `uv sync "
            f"--extra {extra}`, or set policy.generation.backend=hf"
        )


def check_model(model_config: Mapping[str, Any], where: OnCpu | OnGpus) -> None:
    """Refuses models that vLLM does not take, or takes and computes wrongly.

    Raises:
        ConfigError: which, and what to do.
    """
    family = model_config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"policy.model_name: model type {family!r} was never compared with vLLM's; those that "
            f"were: {', '.join(FAMILIES)}. Set policy.generation.backend=hf"
        )
    natural = model_config["hidden_size"] // model_config["num_attention_heads"]
    head_dim = model_config.get("head_dim") or natural
    if family == "qwen2" and head_dim != natural:
        raise ConfigError(
            f"head_dim={head_dim} of this qwen2 is not hidden_size / num_attention_heads = "
            f"{natural}: vLLM would load it, and compute with {natural}. Use a qwen3, or set "
            "policy.generation.backend=hf"
        )
    if isinstance(where, OnGpus):
        return  # vLLM chooses among attentions there, and says itself what none of them has
    sizes = import_module("vllm.v1.attention.backends.cpu_attn").CPUAttentionBackend
    if head_dim not in sizes.get_supported_head_sizes():
        raise ConfigError(
            f"head_dim={head_dim}: vLLM's attention on a CPU has "
            f"{', '.join(map(str, sizes.get_supported_head_sizes()))}. "
            "Set policy.generation.backend=hf"
        )


def write_config(config: Any, folder: Path) -> None:
    """Makes this a folder that vLLM takes for a model: a configuration and nothing else."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    architectures = config.architectures or [CLASSES[config.model_type]]
    text = json.dumps(config.to_dict() | {"architectures": architectures})
    (folder / "config.json").write_text(text)


def _kv_cache_bytes(config: Any, dtype: torch.dtype, longest: int, max_num_seqs: int) -> int:
    per_block = kv_bytes_per_token(config, dtype.itemsize) * BLOCK_TOKENS
    per_sequence = per_block * math.ceil(longest / BLOCK_TOKENS)
    # vLLM keeps one block to itself.
    return min(per_sequence * max_num_seqs + per_block, max(KV_CACHE_BYTES, 2 * per_sequence))


def kv_bytes_per_token(hf_config: Any, itemsize: int, *, num_parts: int = 1) -> int:
    """Bytes that a part of an engine caches of a token: keys and values of its heads, all layers.

    Every part has at least one head.
    """
    heads = attention_shape(hf_config)
    own = max(1, heads.num_kv_heads // num_parts)
    return 2 * int(hf_config.num_hidden_layers) * own * heads.head_dim * itemsize
