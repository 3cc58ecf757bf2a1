"""The settings of Muon that do not change during a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nemo_like.config.optimizer import ScaleMode
from nemo_like.optim.layout import Layout
from nemo_like.optim.newton_schulz import Polynomial, coefficients
from nemo_like.optim.plan import Plan, make_plan
from nemo_like.optim.scale import scale_factor
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
