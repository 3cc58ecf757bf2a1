"""The model and the machine that trains it."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from typing import Any, Literal

from pydantic import Field

from nemo_like.config.base import Conflict, EnvVars, Node, Positive, PositiveFloat
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.optimizer import NO_WARM_UP, OptimizerConfig, SchedulerConfig

Precision = Literal["bfloat16", "float32"]


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
    env_vars: EnvVars = Field(default_factory=dict)
    """Environment variables of the workers."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model (before FSDP shards it further)."""
        return self.tensor_parallel_size * self.context_parallel_size

    @property
    def sequence_divisor(self) -> int:
        """Row lengths are a multiple of this: equal parts per tensor-parallel rank."""
        return self.tensor_parallel_size if self.sequence_parallel else 1

    @property
    def sequence_divisor_keys(self) -> tuple[str, ...]:
        """The fields that `sequence_divisor` is made of."""
        return ("tensor_parallel_size", "sequence_parallel")

    def conflicts(self) -> Iterator[Conflict]:
        """Layouts that this backend does not have."""
        if not self.enabled:  # an idle block is not judged
            return
        if self.context_parallel_size > 1:
            yield Conflict(
                ("context_parallel_size",),
                "Hugging Face models are not cut along the sequence; Megatron's are: "
                "policy.megatron_cfg.enabled=true policy.dtensor_cfg.enabled=false "
                "policy.megatron_cfg.context_parallel_size=...",
            )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            yield Conflict(
                ("sequence_parallel", "tensor_parallel_size"),
                "sequence parallelism is over the tensor-parallel ranks: it needs more than one",
            )


class DynamicBatchingConfig(Node):
    """Micro-batches with as many rows as a token budget holds."""

    enabled: bool = False
    """Sort by length and fill micro-batches up to the budget."""
    train_mb_tokens: Positive | None = None
    """Tokens of a micro-batch, padding included; null is sequence length x micro-batch size."""
    logprob_mb_tokens: Positive | None = None
    """The same for passes without gradient; null is `train_mb_tokens`."""
    sequence_length_round: Positive = 64
    """Lengths count as rounded up to a multiple of this when rows are fitted into the budget."""


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
    tuned_for: str | None = None
    """The one model that this file's numbers are for: another `model_name` is refused."""
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
    megatron_cfg: MegatronConfig = MegatronConfig()
    """The Megatron backend."""

    @property
    def backend(self) -> DTensorConfig | MegatronConfig:
        """The backend that trains: the one place that reads `enabled`."""
        return self.megatron_cfg if self.megatron_cfg.enabled else self.dtensor_cfg

    @property
    def backend_key(self) -> str:
        """The name of the field that `backend` is."""
        return "megatron_cfg" if self.megatron_cfg.enabled else "dtensor_cfg"

    @property
    def active_optimizer(self) -> OptimizerConfig:
        """`optimizer`, with what the active backend overrides."""
        return OptimizerConfig.model_construct(**self._merged("optimizer"))

    @property
    def active_scheduler(self) -> SchedulerConfig:
        """`scheduler`, with what the active backend overrides."""
        return SchedulerConfig.model_construct(**self._merged("scheduler"))

    @property
    def active_max_grad_norm(self) -> float | None:
        """The norm that gradients are scaled down to; None does not clip."""
        own = self.megatron_cfg.optimizer.clip_grad if self.megatron_cfg.enabled else None
        return self.max_grad_norm if own is None else own or None

    @property
    def shards_optimizer(self) -> bool:
        """Megatron: whether data-parallel ranks share out masters and optimizer state."""
        if self.active_optimizer.is_muon:
            return self.active_optimizer.optimizer == "dist_muon"
        return self.megatron_cfg.optimizer.use_distributed_optimizer is not False

    @property
    def sequence_divisor(self) -> int:
        """Row lengths are padded to a multiple of this."""
        return self.make_sequence_length_divisible_by or self.backend.sequence_divisor

    @property
    def logprob_rows(self) -> int:
        """Sequences of one pass without gradient (plain batches)."""
        return self.logprob_batch_size or self.train_micro_batch_size

    def token_budget(self, *names: str) -> tuple[str, int | None]:
        """Key and value of the first of these budgets that is set; None where rows are counted."""
        for block in ("dynamic_batching", "sequence_packing"):
            for name in names if getattr(self, block).enabled else ():
                if (tokens := getattr(getattr(self, block), name)) is not None:
                    return f"{block}.{name}", tokens
        return "", None

    @property
    def length_multiple(self) -> int:
        """A sequence counts as rounded up to a multiple of this where a token budget is filled."""
        dynamic = self.dynamic_batching
        return lcm(self.sequence_divisor, dynamic.sequence_length_round if dynamic.enabled else 1)

    @property
    def longest_sequence(self) -> int:
        """The tokens that the longest sequence counts as where a token budget is filled."""
        multiple = self.length_multiple
        return -(-self.max_total_sequence_length // multiple) * multiple

    def _overrides(self, block: str) -> dict[str, Any]:
        """What the active backend sets itself of `optimizer` or `scheduler`."""
        if not self.megatron_cfg.enabled:
            return {}
        own = getattr(self.megatron_cfg, block)
        names = type(getattr(self, block)).model_fields
        return {n: getattr(own, n) for n in names if getattr(own, n) is not None}

    def _merged(self, block: str) -> dict[str, Any]:
        own = self._overrides(block)
        # Two keys of one thing: who sets one of them replaces both.
        inherited = NO_WARM_UP if own.keys() & NO_WARM_UP.keys() else {}
        return dict(getattr(self, block)) | inherited | own

    def key_of(self, block: str, name: str) -> str:
        """Where the active value of a field of `optimizer` or `scheduler` was set."""
        prefix = "megatron_cfg." if name in self._overrides(block) else ""
        return f"{prefix}{block}.{name}"

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between the blocks of the policy."""
        enabled = [name for name in ("dtensor_cfg", "megatron_cfg") if getattr(self, name).enabled]
        if len(enabled) != 1:
            yield Conflict(
                ("dtensor_cfg.enabled", "megatron_cfg.enabled"),
                "exactly one backend trains: set one of them to true and the other to false",
            )
            return
        yield from self._batching_conflicts()
        yield from self._optimizer_conflicts()
        if self.megatron_cfg.enabled:
            yield from self._megatron_conflicts()

    def _batching_conflicts(self) -> Iterator[Conflict]:
        if self.dynamic_batching.enabled and self.sequence_packing.enabled:
            yield Conflict(
                ("dynamic_batching.enabled", "sequence_packing.enabled"),
                "both fill micro-batches up to a token budget; choose one",
            )
        for name in ("dynamic_batching", "sequence_packing"):
            block: DynamicBatchingConfig | SequencePackingConfig = getattr(self, name)
            for budget in ("train_mb_tokens", "logprob_mb_tokens"):
                tokens, longest = getattr(block, budget), self.longest_sequence
                if block.enabled and tokens and tokens < longest:
                    yield Conflict(
                        (f"{name}.{budget}", "max_total_sequence_length"),
                        "the budget must hold the longest sequence, which counts as "
                        f"{longest} tokens (a multiple of {self.length_multiple})",
                    )
        given, needed = self.make_sequence_length_divisible_by, self.backend.sequence_divisor
        if given is not None and given % needed:
            keys = (f"{self.backend_key}.{key}" for key in self.backend.sequence_divisor_keys)
            yield Conflict(
                ("make_sequence_length_divisible_by", *keys),
                f"this layout needs a multiple of {needed}; leave the key out to get that",
            )

    def _optimizer_conflicts(self) -> Iterator[Conflict]:
        optimizer, scheduler = self.active_optimizer, self.active_scheduler
        for block, active in (("optimizer", optimizer), ("scheduler", scheduler)):
            if self._overrides(block):  # without overrides the block itself reports
                for found in active.conflicts():
                    keys = tuple(self.key_of(block, key) for key in found.keys)
                    yield Conflict(keys, found.message)
        blockwise = optimizer.is_muon and optimizer.muon_tp_mode == "blockwise"
        if blockwise and not self.megatron_cfg.enabled:
            yield Conflict(
                (self.key_of("optimizer", "muon_tp_mode"), "dtensor_cfg.enabled"),
                "orthogonalising the block that one rank holds is for runs that must repeat "
                "Megatron's; duplicated and distributed are exact on every layout",
            )
        lr = self.key_of("optimizer", "lr")
        if scheduler.lr_decay_style != "constant" and optimizer.min_lr > optimizer.lr:
            yield Conflict(
                (lr, self.key_of("optimizer", "min_lr")), "a decay ends below where it starts"
            )
        if scheduler.has_warmup and scheduler.lr_warmup_init > optimizer.lr:
            yield Conflict(
                (lr, self.key_of("scheduler", "lr_warmup_init")), "a warm-up starts below its end"
            )

    def _megatron_conflicts(self) -> Iterator[Conflict]:
        own = self.megatron_cfg.optimizer
        if self.active_optimizer.is_muon and own.use_distributed_optimizer:
            yield Conflict(
                (
                    "megatron_cfg.optimizer.use_distributed_optimizer",
                    self.key_of("optimizer", "optimizer"),
                ),
                "that is for AdamW: `muon` keeps all masters on every data-parallel rank, "
                "`dist_muon` shares them out by itself; set use_distributed_optimizer=false",
            )
        if self.megatron_cfg.pipeline_dtype not in (None, self.precision):
            yield Conflict(
                ("megatron_cfg.pipeline_dtype", "precision"),
                "stages exchange what they compute in: leave pipeline_dtype out",
            )
        if own.bf16 is not None and own.bf16 != (self.precision == "bfloat16"):
            yield Conflict(
                ("megatron_cfg.optimizer.bf16", "precision"), "they say different things"
            )
