"""The optimizer and its schedules: one block for both backends, with Megatron's flat names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from nemo_like.config.base import (
    Conflict,
    Fraction,
    Node,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)

OptimizerName = Literal["adam", "sgd", "muon", "dist_muon"]
ScaleMode = Literal["spectral", "unit_rms_norm", "shape_scaling", "original", "match_rms_adamw"]
CoefficientType = Literal[
    "quintic",
    "simple",
    "polar_express",
    "cans",
    "cubic5",
    "deepseekv4",
    "minimax",
    "pion",
    "custom",
]
DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]

NEWTON_SCHULZ_STEPS: dict[str, range] = {
    # `quintic` and `cubic5` are five different polynomials, each made for what the one before it
    # leaves: one step more or less sends singular values towards zero.
    "quintic": range(5, 6),
    "cubic5": range(5, 6),
    # One polynomial, repeated.
    "simple": range(4, 100),
    # Five opening polynomials, then one that converges and may repeat.
    "polar_express": range(5, 100),
    "cans": range(5, 100),
    # Eight times `simple`, then the polishing polynomial this schedule is chosen for.
    "deepseekv4": range(10, 100),
    # Four polynomials, made as one.
    "minimax": range(4, 5),
    # Promotions, then suppressions, five together.
    "pion": range(5, 6),
    # As many as rows are given.
    "custom": range(1, 100),
}
"""The step counts that each Newton-Schulz schedule was made for."""


class OptimizerConfig(Node):
    """Which parameters are updated how."""

    optimizer: OptimizerName = "adam"
    """`adam` (AdamW), `sgd`, or `muon` (= `dist_muon`): Muon for matrices, AdamW for the rest."""
    lr: NonNegativeFloat = 5e-6
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
    muon_use_nesterov: bool = False
    """Orthogonalise a look-ahead of the momentum. `muon_nesterov` is the same key."""
    muon_scale_mode: ScaleMode = "spectral"
    """Factor of a (rows, cols) matrix's orthogonal update; `spectral` is sqrt(max(rows, cols))."""
    muon_extra_scale_factor: PositiveFloat | None = None
    """Further factor; null is 0.2 for `spectral` (steps of AdamW's size), else 1."""
    muon_coefficient_type: CoefficientType = "quintic"
    """The Newton-Schulz schedule."""
    muon_num_ns_steps: Positive = 5
    """Newton-Schulz steps; each schedule allows only the counts it was made for."""
    muon_ns_coefficients: tuple[tuple[float, float, float], ...] = ()
    """The rows (a, b, c) of `muon_coefficient_type=custom`, one for each step."""
    muon_promotion_steps: Literal[0, 1, 2, 3, 4] | None = None
    """Opening steps of `muon_coefficient_type=pion`; more let more directions pass. Null is 0."""
    muon_fp32_matmul_prec: Literal["medium", "high", "highest"] = "medium"
    """Precision of Newton-Schulz: `medium` is bf16, `high` and `highest` are fp32."""
    muon_ns_dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Overrides `muon_fp32_matmul_prec`."""
    muon_tp_mode: Literal["duplicated", "distributed", "blockwise"] = "duplicated"
    """Under tensor parallelism; `blockwise` (Megatron alone) is not exact, the others are."""
    muon_wire_dtype: Literal["float32", "bfloat16"] | None = None
    """Type in which blocks travel between ranks; null is bf16 where Newton-Schulz is bf16."""
    muon_bucket_mb: PositiveFloat = 64.0
    """Most megabytes of whole matrices that one rank works on while the next ones travel."""
    muon_split_qkv: bool = True
    """Orthogonalise q, k and v of a packed matrix separately."""
    muon_split_gate_up: bool = True
    """Orthogonalise gate and up of a packed matrix separately (Megatron alone does not)."""
    muon_split_heads: bool = False
    """Orthogonalise the rows of each head of q, k and v separately."""
    muon_zero_grad: Literal["skip", "always"] = "skip"
    """Whether a matrix whose gradient is exactly zero stays (`skip`) or moves on by momentum."""
    muon_clip: Literal["adamw_only", "all"] = "adamw_only"
    """Whose gradients `max_grad_norm` scales down; the norm that counts is of all of them."""
    muon_log_every: Positive = 10
    """Steps between two looks at the spectra and sizes of Muon's updates."""
    muon_include: tuple[str, ...] = ()
    """Regular expressions of parameter names that Muon takes although the rules would not."""
    muon_exclude: tuple[str, ...] = ()
    """Regular expressions of parameter names that AdamW takes although the rules say Muon."""

    @property
    def is_muon(self) -> bool:
        """True where hidden matrices are Muon's."""
        return self.optimizer in ("muon", "dist_muon")

    def conflicts(self) -> Iterator[Conflict]:
        """Step counts a schedule was not made for; decays that never forget; broken expressions."""
        allowed = NEWTON_SCHULZ_STEPS[self.muon_coefficient_type]
        if self.muon_num_ns_steps not in allowed:
            counts = str(allowed[0]) if len(allowed) == 1 else f"{allowed[0]} or more"
            yield Conflict(
                ("muon_coefficient_type", "muon_num_ns_steps"),
                f"the {self.muon_coefficient_type} schedule is made for {counts} steps; "
                "with other counts its result is not orthogonal",
            )
        yield from self._row_conflicts()
        if self.muon_promotion_steps is not None and self.muon_coefficient_type != "pion":
            yield Conflict(
                ("muon_coefficient_type", "muon_promotion_steps"),
                f"only pion has promotion steps, not {self.muon_coefficient_type}",
            )
        for name in ("adam_beta1", "adam_beta2", "sgd_momentum", "muon_momentum"):
            if getattr(self, name) == 1:
                yield Conflict((name,), "must be less than 1: at 1 no gradient ever enters")
        for name in ("muon_include", "muon_exclude"):
            for pattern in getattr(self, name):
                if reason := _broken_expression(pattern):
                    yield Conflict((name,), f"{pattern!r} is no regular expression: {reason}")

    def _row_conflicts(self) -> Iterator[Conflict]:
        """Rows without their schedule, too few or too many, or such that steps would explode."""
        rows, custom = self.muon_ns_coefficients, self.muon_coefficient_type == "custom"
        keys = ("muon_coefficient_type", "muon_ns_coefficients")
        if custom != bool(rows):
            yield Conflict(
                keys, "rows (a, b, c) are for muon_coefficient_type=custom, and it for them"
            )
        elif custom and len(rows) != self.muon_num_ns_steps:
            yield Conflict(
                ("muon_num_ns_steps", "muon_ns_coefficients"),
                f"there are {len(rows)} rows for {self.muon_num_ns_steps} steps; give one for each",
            )
        elif custom and (worst := _worst_value(rows)) is not None:
            yield Conflict(
                keys,
                f"a singular value of {worst:g} ends outside of [-{LONGEST:g}, {LONGEST:g}]; "
                "rows must take the whole of (0, 1] near to one, and a little more for round-off",
            )


LONGEST = 2.0
"""What no singular value may end above under custom rows: a step of twice the length."""


def _worst_value(rows: Iterable[tuple[float, float, float]]) -> float | None:
    """The singular value up to 1.005 that these steps take farthest, if it is too far."""
    ends: dict[float, float] = {}
    for start in (i / 4000 for i in range(1, 4021)):
        end = start
        for a, b, c in rows:
            square = end * end
            end *= a + square * (b + square * c)
            if not abs(end) < 1e9:  # lost: larger powers would overflow
                return start
        ends[start] = abs(end)
    worst = max(ends, key=ends.__getitem__)
    return worst if ends[worst] > LONGEST else None


def _broken_expression(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


NO_WARM_UP: dict[str, Any] = {"lr_warmup_iters": 0, "lr_warmup_fraction": None}
"""The two keys for the length of a warm-up, saying that there is none."""


class SchedulerConfig(Node):
    """Learning rate and weight decay over the steps, with Megatron's names."""

    lr_decay_style: DecayStyle = "constant"
    """Shape of the decay from `lr` to `min_lr`."""
    lr_decay_iters: Positive | None = None
    """Steps until `min_lr` is reached; null is the length of the run."""
    lr_warmup_iters: NonNegative = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: Fraction | None = None
    """The same as a share of `lr_decay_iters`; of the two keys the later one counts."""
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

    def conflicts(self) -> Iterator[Conflict]:
        """Parts of the schedule that do not fit into each other."""
        wsd = self.lr_decay_style == "WSD"
        if wsd and self.lr_wsd_decay_iters is None:
            yield Conflict(
                ("lr_decay_style", "lr_wsd_decay_iters"),
                "WSD needs the length of its last part: set lr_wsd_decay_iters",
            )
        if not wsd and self.lr_wsd_decay_iters is not None:
            yield Conflict(
                ("lr_decay_style", "lr_wsd_decay_iters"),
                "only lr_decay_style=WSD has such a part",
            )
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            yield Conflict(
                ("lr_warmup_iters", "lr_warmup_fraction"),
                "two lengths of one warm-up: leave one of them out",
            )
        elif self.lr_decay_iters is not None:
            yield from self.misfits(self.lr_decay_iters)
        both = (self.start_weight_decay, self.end_weight_decay)
        if self.weight_decay_incr_style == "constant" and both[0] != both[1]:
            yield Conflict(
                ("weight_decay_incr_style", "start_weight_decay", "end_weight_decay"),
                "a constant weight decay starts and ends at the same value",
            )

    @property
    def has_warmup(self) -> bool:
        """True where the learning rate starts at `lr_warmup_init`."""
        return bool(self.lr_warmup_iters or self.lr_warmup_fraction)

    def warmup_steps(self, total_steps: int) -> float:
        """The length of the warm-up in a run of so many steps, not rounded (nor is Megatron's)."""
        if self.lr_warmup_fraction is None:
            return self.lr_warmup_iters
        return self.lr_warmup_fraction * (self.lr_decay_iters or total_steps)

    def misfits(self, total_steps: int) -> Iterator[Conflict]:
        """Parts of the schedule that a run of so many steps has no room for."""
        end, warmup = self.lr_decay_iters or total_steps, self.warmup_steps(total_steps)
        key = "lr_warmup_iters" if self.lr_warmup_fraction is None else "lr_warmup_fraction"
        last = self.lr_wsd_decay_iters or 0
        if warmup > end or (warmup == end and self.lr_decay_style != "constant"):
            yield Conflict(
                (key, "lr_decay_iters"),
                f"the warm-up ({warmup:g} steps) must end before the schedule does ({end})",
            )
        elif warmup + last > end:
            yield Conflict(
                (key, "lr_wsd_decay_iters", "lr_decay_iters"),
                f"warm-up ({warmup:g} steps) and last part ({last}) are together longer than the "
                f"schedule ({end})",
            )
