"""Muon's update rule: momentum, orthogonalised, scaled by shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_like.config.optimizer import CoefficientType, ScaleMode
from nemo_like.optim.exchange import on_whole_matrices
from nemo_like.optim.newton_schulz import coefficients, polar
from nemo_like.optim.norm import local
from nemo_like.optim.scale import scale_factor

CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
"""Elements that go through Newton-Schulz together: what fits the cache, or what fills the GPU."""


@dataclass(frozen=True, slots=True)
class MuonRule:
    """The settings of the rule that do not change during a run."""

    momentum: float = 0.95
    nesterov: bool = False
    scale_mode: ScaleMode = "spectral"
    extra_scale_factor: float = 0.2
    coefficient_type: CoefficientType = "quintic"
    ns_steps: int = 5
    ns_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        coefficients(self.coefficient_type, self.ns_steps)

    def orthogonalized(self, matrices: list[Tensor]) -> list[Tensor]:
        """The polar factors of whole matrices of one shape, in `ns_dtype`."""
        stacked = matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(matrices)
        return list(
            polar(
                stacked,
                rows=coefficients(self.coefficient_type, self.ns_steps),
                dtype=self.ns_dtype,
            ).unbind()
        )

    def scale(self, shape: torch.Size) -> float:
        """The factor of the orthogonal update of a matrix, or of each matrix of a stack."""
        return self.extra_scale_factor * scale_factor(self.scale_mode, shape[-2], shape[-1])

    def step(
        self,
        parameters: Sequence[Tensor],
        momenta: Sequence[Tensor],
        *,
        lr: float,
        weight_decay: float,
    ) -> list[Tensor]:
        """The norm of this rank's part of each update, for a learning rate of one, once applied.

        Momentum is an average, M <- mu M + (1 - mu) G; the accumulated form M <- mu M + G gives the
        same direction. Nesterov looks ahead to mu M + (1 - mu) G once more. Weight decay is
        decoupled and goes by the plain learning rate, not by the one that the scale makes of it.
        Gradients are only read.

        Source: Jordan et al., https://kellerjordan.github.io/posts/muon/, and `torch.optim.Muon`.
        Changed: the gradient is not overwritten by Nesterov's look-ahead, the momentum not by
        Newton-Schulz.
        """
        norms: list[Tensor] = []
        for chunk in _chunks(parameters):
            layouts = [parameters[i] for i in chunk]
            weights = [local(p) for p in layouts]
            gradients = [local(p.grad) for p in layouts if p.grad is not None]
            buffers = [local(momenta[i]) for i in chunk]
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            ahead = buffers
            if self.nesterov:
                ahead = list(torch._foreach_lerp(gradients, buffers, self.momentum))
            blocks = on_whole_matrices(ahead, layouts, self.orthogonalized)
            # Of weights that are kept on the CPU the exchange returns blocks on the GPU.
            updates = [block.to(w) for block, w in zip(blocks, weights, strict=True)]
            factor = self.scale(layouts[0].shape)
            if weight_decay:
                torch._foreach_mul_(weights, 1 - lr * weight_decay)
            torch._foreach_add_(weights, updates, alpha=-lr * factor)
            norms += torch._foreach_mul(torch._foreach_norm(updates), factor)
        return norms


def _chunks(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of parameters of one shape, to be updated together; the same on every rank."""
    by_shape: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for i, parameter in enumerate(parameters):
        by_shape.setdefault((parameter.shape, parameter.device), []).append(i)
    for (shape, device), positions in by_shape.items():
        size = max(1, CHUNK_ELEMENTS[device.type] // shape.numel())
        for start in range(0, len(positions), size):
            yield positions[start : start + size]
