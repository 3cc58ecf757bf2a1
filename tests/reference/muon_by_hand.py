"""Muon as its authors write it down, in fp64 and without any care for speed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIMPLE = ((3.4445, -4.7750, 2.0315),) * 5


def polar_by_hand(matrix: Tensor, rows=SIMPLE) -> Tensor:
    """Newton-Schulz through the singular values: each step maps every one of them."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for row in rows:
        values = sum(c * values ** (2 * i + 1) for i, c in enumerate(row))
    return left @ torch.diag(values) @ right


class KellerJordan:
    """The rule of Keller Jordan's `muon.py`: averaged momentum, decay after Newton-Schulz."""

    def __init__(self, weights, *, lr, momentum=0.95, nesterov=True, decay=0.0):
        self.weights, self.lr, self.decay = weights, lr, decay
        self.momentum, self.nesterov = momentum, nesterov
        self.buffers = [torch.zeros_like(w) for w in weights]

    def step(self, gradients: list[Tensor]) -> None:
        for W, M, G in zip(self.weights, self.buffers, gradients, strict=True):
            update = polar_by_hand(self.direction(M, G)) * self.scale(*W.shape)
            W.mul_(1 - self.lr * self.decay)
            W.sub_(self.lr * update)

    def direction(self, M: Tensor, G: Tensor) -> Tensor:
        mu = self.momentum
        M.copy_(mu * M + (1 - mu) * G)
        return mu * M + (1 - mu) * G if self.nesterov else M

    def scale(self, rows: int, columns: int) -> float:
        return math.sqrt(max(1.0, rows / columns))


class Moonlight(KellerJordan):
    """The rule of arXiv:2502.16982: accumulated momentum, steps of AdamW's size."""

    def direction(self, M: Tensor, G: Tensor) -> Tensor:
        M.copy_(self.momentum * M + G)
        return G + self.momentum * M if self.nesterov else M

    def scale(self, rows: int, columns: int) -> float:
        return 0.2 * math.sqrt(max(rows, columns))
