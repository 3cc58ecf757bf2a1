"""The settings of Muon that do not change during a run, and how large they make its update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nemo_like.config.optimizer import ScaleMode
from nemo_like.optim.layout import Layout
from nemo_like.optim.newton_schulz import Polynomial, coefficients
from nemo_like.optim.plan import Plan, make_plan
from nemo_like.optim.views import View


@dataclass(frozen=True, slots=True)
class MuonRule:
    """How matrices are moved.

    Blocks travel in `wire_dtype` (None: bf16 if Newton-Schulz is in bf16, else the type of the
    weights). A matrix that stays on one rank is rounded in the same way, so that on a CPU, which
    takes matrices one by one, the layout of a run does not change its numbers.
    """

    momentum: float = 0.95
    nesterov: bool = False
    scale_mode: ScaleMode = "spectral"
    extra_scale_factor: float = 0.2
    polynomials: tuple[Polynomial, ...] = coefficients("quintic", 5)
    ns_dtype: torch.dtype = torch.bfloat16
    wire_dtype: torch.dtype | None = None
    bucket_bytes: float = 64e6
    zero_grad: Literal["skip", "always"] = "skip"

    def scale(self, rows: int, columns: int) -> float:
        """The factor of the orthogonal update of a matrix of this shape."""
        return self.extra_scale_factor * scale_factor(self.scale_mode, rows, columns)

    def wire(self, weights: torch.dtype) -> torch.dtype:
        """The type in which blocks of weights of this type travel."""
        if self.wire_dtype is not None:
            return self.wire_dtype
        return torch.bfloat16 if self.ns_dtype == torch.bfloat16 else weights

    def plan(self, layouts: Sequence[Layout], views: Sequence[View], weights: torch.dtype) -> Plan:
        """Who orthogonalises which matrix of weights of this type."""
        bucket_elements = self.bucket_bytes / self.wire(weights).itemsize
        return make_plan(
            layouts, views, steps=len(self.polynomials), bucket_elements=bucket_elements
        )


def scale_factor(mode: ScaleMode, rows: int, columns: int) -> float:
    """The factor of the orthogonal update of a rows x columns (outputs x inputs) matrix.

    An orthogonal update has spectral norm 1 and root mean square 1/sqrt(max(rows, columns)). The
    names are Megatron's and torch's; beware that others use the same words for different rules:

    | here                    | elsewhere                                    | factor            |
    |-------------------------|----------------------------------------------|-------------------|
    | spectral                |                                              | sqrt(max(R, C))   |
    | match_rms_adamw         | rms_norm (dion), Moonlight                   | .2sqrt(max(R, C)) |
    | unit_rms_norm           | spectral_norm (dion), spectral_unclamped     | sqrt(R / C)       |
    | shape_scaling, original | Keller Jordan                                | sqrt(max(1, R/C)) |

    Source: Megatron-LM and Emerging-Optimizers (`spectral`, `unit_rms_norm`, `shape_scaling`),
    torch.optim (`original`, `match_rms_adamw`: Liu et al., https://arxiv.org/abs/2502.16982).
    """
    match mode:
        case "spectral":
            return math.sqrt(max(rows, columns))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        case "unit_rms_norm":
            return math.sqrt(rows / columns)
        case "shape_scaling" | "original":
            return math.sqrt(max(1.0, rows / columns))


def default_extra_factor(mode: ScaleMode) -> float:
    """The further factor where the configuration leaves it open.

    `spectral` alone makes updates of root mean square 1. AdamW's are about 0.2, and with that
    factor one learning rate serves both halves of the optimizer.

    Source: Liu et al., https://arxiv.org/abs/2502.16982, section 2.2.
    """
    return 0.2 if mode == "spectral" else 1.0
