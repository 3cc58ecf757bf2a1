"""The optimizer and its schedules: one block for both backends, with Megatron's flat names."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, Field

from nemo_like.config.base import (
    Fraction,
    Node,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)

OptimizerName = Literal["adam", "sgd", "muon", "dist_muon"]
ScaleMode = Literal[
    "spectral", "unit_rms_norm", "shape_scaling", "original", "match_rms_adamw"
]
CoefficientType = Literal["quintic", "simple", "polar_express", "cans", "cubic5", "deepseekv4"]
DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]


class OptimizerConfig(Node):
    """Which parameters are updated how."""

    optimizer: OptimizerName = "adam"
    """`adam` (AdamW), `sgd`, or `muon`: Muon for hidden matrices, AdamW for the rest. `dist_muon` = `muon`."""
    lr: PositiveFloat | Literal[0] = 5e-6
    """Peak learning rate, of both halves."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; the schedule may change it."""
    adam_beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of AdamW's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    sgd_momentum: Fraction = 0.9
    """Momentum of `optimizer=sgd`."""
    muon_momentum: Fraction = 0.95
    """Decay of Muon's momentum, an exponential moving average of gradients."""
    muon_use_nesterov: bool = Field(
        default=False, validation_alias=AliasChoices("muon_use_nesterov", "muon_nesterov")
    )
    """Orthogonalise a look-ahead of the momentum. `muon_nesterov` is the same key."""
    muon_scale_mode: ScaleMode = "spectral"
    """Factor of the orthogonal update for a (rows, cols) matrix; `spectral` is sqrt(max(rows, cols))."""
    muon_extra_scale_factor: PositiveFloat | None = None
    """Further factor; null is 0.2 for `spectral` (an AdamW-sized step, so one lr serves both halves), else 1."""
    muon_coefficient_type: CoefficientType = "quintic"
    """The Newton-Schulz schedule."""
    muon_num_ns_steps: Positive = 5
    """Newton-Schulz steps; each schedule allows only the counts it was made for."""
    muon_fp32_matmul_prec: Literal["medium", "high", "highest"] = "medium"
    """Precision of Newton-Schulz: `medium` is bf16, `high` and `highest` are fp32."""
    muon_ns_dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Overrides `muon_fp32_matmul_prec`."""
    muon_tp_mode: Literal["duplicated", "distributed", "blockwise"] = "duplicated"
    """Under tensor parallelism: the first two are exact; `blockwise` orthogonalises each shard by itself."""
    muon_split_qkv: bool = True
    """Orthogonalise q, k and v of a packed matrix separately."""
    muon_include: tuple[str, ...] = ()
    """Regular expressions of parameter names that Muon takes although the rules would not."""
    muon_exclude: tuple[str, ...] = ()
    """Regular expressions of parameter names that AdamW takes although the rules would give them to Muon."""


class SchedulerConfig(Node):
    """Learning rate and weight decay over the steps, with Megatron's names."""

    lr_decay_style: DecayStyle = "constant"
    """Shape of the decay from `lr` to `min_lr`."""
    lr_decay_iters: Positive | None = None
    """Steps until `min_lr` is reached; null is the length of the run."""
    lr_warmup_iters: NonNegative = 0
    """Steps of linear warm-up."""
    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate that the warm-up starts from."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the last part of `WSD`."""
    lr_wsd_decay_iters: Positive | None = None
    """Length of the last part of `WSD`, in steps."""
    start_weight_decay: NonNegativeFloat | None = None
    """Weight decay at step 0; null is `weight_decay`."""
    end_weight_decay: NonNegativeFloat | None = None
    """Weight decay at the end; null is `weight_decay`."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay goes from start to end."""
