"""The model and the machine that trains it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from nemo_like.config.base import Node, Positive, PositiveFloat
from nemo_like.config.optimizer import OptimizerConfig, SchedulerConfig

Precision = Literal["bfloat16", "float16", "float32"]


class TokenizerConfig(Node):
    """The tokenizer and its chat template."""

    name: str | None = None
    """Name or path; null is `policy.model_name`."""
    chat_template: str | None = "default"
    """`default` (the tokenizer's), null (plain concatenation), a .jinja file, or a template."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables handed to the template."""


class DTensorConfig(Node):
    """FSDP2 and tensor parallelism on Hugging Face models."""

    enabled: bool = True
    """Train with this backend."""
    tensor_parallel_size: Positive = 1
    """Ranks that share each matrix."""
    context_parallel_size: Positive = 1
    """Ranks that share each sequence; only 1 here."""
    dp_replicate_size: Positive = 1
    """HSDP: copies of the sharded model."""
    sequence_parallel: bool = False
    """Under tensor parallelism: keep activations between blocks sharded along the sequence."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""
    env_vars: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the workers."""


class DynamicBatchingConfig(Node):
    """Micro-batches with as many rows as a token budget holds."""

    enabled: bool = False
    """Sort by length and fill micro-batches up to the budget."""
    train_mb_tokens: Positive | None = None
    """Tokens of a training micro-batch, padding included; null is sequence length x micro-batch size."""
    logprob_mb_tokens: Positive | None = None
    """The same for passes without gradient; null is `train_mb_tokens`."""
    sequence_length_round: Positive = 64
    """Row lengths are rounded up to a multiple of this."""


class SequencePackingConfig(Node):
    """Several sequences in one row, with attention that never crosses them."""

    enabled: bool = False
    """Pack."""
    train_mb_tokens: Positive | None = None
    """Tokens of a packed row; null is sequence length x micro-batch size."""
    logprob_mb_tokens: Positive | None = None
    """The same for passes without gradient; null is `train_mb_tokens`."""
    algorithm: Literal["modified_first_fit_decreasing", "first_fit_decreasing", "concatenative"] = (
        "modified_first_fit_decreasing"
    )
    """How sequences are put into rows."""


class PolicyConfig(Node):
    """The model in training."""

    model_name: str = "meta-llama/Llama-3.2-1B"
    """A local path, a bundled configuration, or a Hugging Face name."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` makes a newborn model from the configuration and the seed."""
    hf_config_overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the model's configuration to replace."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer and its chat template."""
    train_global_batch_size: Positive = 32
    """Sequences of one optimizer step."""
    train_micro_batch_size: Positive = 1
    """Sequences of one forward pass per rank (plain batches)."""
    logprob_batch_size: Positive | None = None
    """Sequences of one pass without gradient; null is `train_micro_batch_size`."""
    logprob_chunk_size: Positive = 1024
    """Tokens whose logits exist at the same time."""
    max_total_sequence_length: Positive = 1024
    """Longest sequence, prompt and response together."""
    precision: Precision = "bfloat16"
    """Compute type; the weights in training are fp32."""
    make_sequence_length_divisible_by: Positive | None = None
    """Row lengths are padded to a multiple of this; null is what the active backend needs."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this norm; null does not clip."""
    dynamic_batching: DynamicBatchingConfig = DynamicBatchingConfig()
    """Micro-batches by token budget."""
    sequence_packing: SequencePackingConfig = SequencePackingConfig()
    """Several sequences in one row."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer, of either backend."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Learning rate and weight decay over the steps, of either backend."""
    dtensor_cfg: DTensorConfig = DTensorConfig()
    """The FSDP2 and tensor-parallel backend."""
