"""The Megatron backend: layout, mixture of experts, and what it overrides of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import lcm
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from nemo_like.config.base import Conflict, EnvVars, Node, NonNegativeFloat, Positive
from nemo_like.config.optimizer import OptimizerConfig, SchedulerConfig

N = TypeVar("N", bound=Node)

_TE = "the fused kernel is TransformerEngine's, which is not used here"
NOT_HERE: dict[str, str] = {
    "apply_rope_fusion": _TE,
    "moe_permute_fusion": _TE,
    "gradient_accumulation_fusion": "the fused kernel is apex's, which is not used here",
    "moe_shared_expert_overlap": "none of the supported models has shared experts",
    "moe_router_bias_update_rate": "the bias needs routers with sigmoid scores, which none of the "
    "supported models has",
    "optimizer.use_precision_aware_optimizer": "masters and optimizer state are fp32",
    "optimizer.optimizer_cpu_offload": "masters and optimizer state are on the device that trains",
    "distributed_data_parallel_config.overlap_param_gather": "weights are gathered right after the "
    "step, not during the forward pass",
}
"""Keys that must not be on, below `policy.megatron_cfg`, and why."""
OVERRIDABLE = ("moe_aux_loss_coeff",)
"""Fields of TransformerConfig that are neither the model's nor this backend's to decide."""


def _annotation(field: FieldInfo) -> Any:
    """The type of a field with its limits."""
    constraints = tuple(field.metadata)
    return Annotated[(field.annotation, *constraints)] if constraints else field.annotation


def inheriting(base: type[Node]) -> Callable[[type[N]], type[N]]:
    """A class decorator that adds every field of `base`, nullable: null says what `base` says."""

    def extend(cls: type[N]) -> type[N]:
        fields: dict[str, Any] = {
            name: (
                _annotation(field) | None,
                Field(default=None, description=field.description),
            )
            for name, field in base.model_fields.items()
        }
        extended = create_model(
            cls.__name__, __base__=cls, __module__=cls.__module__, __doc__=cls.__doc__, **fields
        )
        return extended

    return extend


@inheriting(OptimizerConfig)
class MegatronOptimizerConfig(Node):
    """What this backend overrides of `policy.optimizer` (null inherits), and keys of its own."""

    bf16: bool | None = None
    """Compute in bfloat16; null follows `policy.precision`, which it must agree with."""
    fp16: Literal[False] | None = None
    """float16 would need loss scaling, which is not here."""
    params_dtype: Literal["float32"] | None = None
    """Type of the weights in training: always fp32 masters."""
    clip_grad: NonNegativeFloat | None = None
    """Gradients are scaled down to this norm; null is `policy.max_grad_norm`, 0 does not clip."""
    use_distributed_optimizer: bool | None = None
    """Share out masters and state over data-parallel ranks; null is yes, but for Muon: `muon`
    does not, `dist_muon` does."""
    use_precision_aware_optimizer: bool | None = None
    """Optimizer state in lower precision; only null and false here."""
    optimizer_cpu_offload: bool | None = None
    """Optimizer state in host memory; only null and false here."""


@inheriting(SchedulerConfig)
class MegatronSchedulerConfig(Node):
    """What this backend overrides of `policy.scheduler`; null inherits."""


class MegatronDDPConfig(Node):
    """How gradients are reduced."""

    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    overlap_grad_reduce: bool | None = None
    """Reduce while the backward pass goes on; null is yes where there is more than one rank."""
    overlap_param_gather: bool | None = None
    """Gather weights during the forward pass; only null and false here."""


class MegatronConfig(Node):
    """Tensor, pipeline, context and expert parallelism with megatron-core."""

    enabled: bool = False
    """Train with this backend."""
    tensor_model_parallel_size: Positive = 1
    """Ranks that share each matrix."""
    pipeline_model_parallel_size: Positive = 1
    """Ranks that share the layers."""
    context_parallel_size: Positive = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: Positive = 1
    """Ranks that share the experts."""
    expert_tensor_parallel_size: Positive = 1
    """Ranks that share each matrix of an expert."""
    num_layers_in_first_pipeline_stage: Positive | None = None
    """Layers of the first stage; null shares evenly."""
    num_layers_in_last_pipeline_stage: Positive | None = None
    """Layers of the last stage; null shares evenly."""
    sequence_parallel: bool = False
    """Under tensor parallelism: keep activations between blocks sharded along the sequence."""
    pipeline_dtype: Literal["bfloat16", "float32"] | None = None
    """Type of activations between stages; null is `policy.precision`, which it must agree with."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    recompute_granularity: Literal["full", "selective"] = "full"
    """Under `activation_checkpointing`: whole layers, or `recompute_modules` only."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe"], ...] | None = None
    """Under `recompute_granularity=selective`: parts to recompute; null is core attention."""
    freeze_moe_router: bool = False
    """Do not train the routers."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Type of the routing arithmetic; null is `policy.precision`."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "sinkhorn", "none"] = "none"
    """Loss that evens out the experts' load."""
    moe_router_bias_update_rate: NonNegativeFloat = 0.0
    """Step of the load-balancing bias; only 0 here."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts."""
    moe_permute_fusion: bool = False
    """Fused kernel that sorts tokens by expert; only false here."""
    moe_shared_expert_overlap: bool = False
    """Compute shared experts while tokens travel; only false here."""
    apply_rope_fusion: bool = False
    """Fused kernel for rotary embeddings; only false here."""
    bias_activation_fusion: bool = True
    """Fused kernel for bias and activation."""
    gradient_accumulation_fusion: bool = False
    """Fused kernel that adds weight gradients in place; only false here."""
    empty_unused_memory_level: Annotated[int, Field(ge=0, le=2)] = 1
    """Give cached GPU memory back: 0 never, 1 after the backward pass, 2 also after the step."""
    model_overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of megatron-core's TransformerConfig to replace: `moe_aux_loss_coeff` alone."""
    env_vars: EnvVars = Field(default_factory=dict)
    """Environment variables of the workers."""
    distributed_data_parallel_config: MegatronDDPConfig = MegatronDDPConfig()
    """How gradients are reduced."""
    optimizer: MegatronOptimizerConfig = MegatronOptimizerConfig()
    """What this backend overrides of `policy.optimizer`."""
    scheduler: MegatronSchedulerConfig = MegatronSchedulerConfig()
    """What this backend overrides of `policy.scheduler`."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def sequence_divisor(self) -> int:
        """Row lengths are a multiple of this: two chunks per CP rank, equal parts per TP rank."""
        parts = self.tensor_model_parallel_size if self.sequence_parallel else 1
        cp = self.context_parallel_size
        return parts if cp == 1 else cp * lcm(2, parts)

    @property
    def sequence_divisor_keys(self) -> tuple[str, ...]:
        """The fields that `sequence_divisor` is made of."""
        return ("tensor_model_parallel_size", "context_parallel_size", "sequence_parallel")

    def conflicts(self) -> Iterator[Conflict]:
        """Layouts that megatron-core refuses, found before it is imported."""
        if not self.enabled:  # the only place that may: an idle block is not judged
            return
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if self.sequence_parallel and tp == 1:
            yield Conflict(
                ("sequence_parallel", "tensor_model_parallel_size"),
                "sequence parallelism is over the tensor-parallel ranks: it needs more than one",
            )
        if self.expert_model_parallel_size > 1 and tp > 1 and not self.sequence_parallel:
            yield Conflict(
                (
                    "expert_model_parallel_size",
                    "tensor_model_parallel_size",
                    "sequence_parallel",
                ),
                "experts under tensor parallelism need sequence_parallel=true",
            )
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            if getattr(self, name) is not None and pp == 1:
                yield Conflict((name, "pipeline_model_parallel_size"), "there is only one stage")
        yield from self._recompute_conflicts()
        yield from self._absent()

    def _recompute_conflicts(self) -> Iterator[Conflict]:
        if self.recompute_modules is None:
            return
        if self.recompute_granularity != "selective":
            yield Conflict(
                ("recompute_modules", "recompute_granularity"),
                "modules are chosen under recompute_granularity=selective only",
            )
        if not self.activation_checkpointing:
            yield Conflict(
                ("recompute_modules", "activation_checkpointing"),
                "nothing is recomputed without activation_checkpointing=true",
            )

    def _absent(self) -> Iterator[Conflict]:
        for key, reason in NOT_HERE.items():
            block, _, name = key.rpartition(".")
            if getattr(getattr(self, block) if block else self, name):
                yield Conflict((key,), f"absent on purpose: {reason}; leave it out")
        for name in self.model_overrides:
            if name not in OVERRIDABLE:
                yield Conflict(
                    (f"model_overrides.{name}",),
                    f"not a field that can be replaced; those are {', '.join(OVERRIDABLE)}. The "
                    "model's shape is policy.hf_config_overrides",
                )
        balancing = "moe_router_load_balancing_type"
        if self.model_overrides.keys() & OVERRIDABLE and getattr(self, balancing) == "none":
            yield Conflict(
                ("model_overrides", balancing), "a coefficient of a loss that there is not"
            )
