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


def megatron_layer_by_hand(
    momenta: dict[str, Tensor],
    scale,
    *,
    num_blocks: int = 1,
    split_qkv: bool = True,
    split_gate_up: bool = True,
) -> dict[str, Tensor]:
    """The updates of a layer's q, k, v, o, gate, up and down, each [out, in], for lr = 1.

    `num_blocks` ranks have a part of each: rows of what fans out, columns of what fans in, and of
    what is not split the parts of q, k and v (or gate and up) in one matrix. Each is made
    orthogonal alone, and as long as `scale(rows, columns)` of that part says. The order of
    rows does not matter: that of the updates is that of the momenta.
    """
    together = [["q", "k", "v"]] if not split_qkv else [["q"], ["k"], ["v"]]
    together += [["gate", "up"]] if not split_gate_up else [["gate"], ["up"]]
    found: dict[str, list[Tensor]] = {name: [] for name in momenta}
    for names in together:
        for block in range(num_blocks):
            parts = [momenta[name].chunk(num_blocks)[block] for name in names]
            whole = torch.cat(parts)
            updates = scale(*whole.shape) * polar_by_hand(whole)
            for name, rows in zip(names, updates.split([len(part) for part in parts]), strict=True):
                found[name].append(rows)
    for name in ("o", "down"):
        columns = momenta[name].chunk(num_blocks, 1)
        found[name] = [(scale(*part.shape) * polar_by_hand(part)).mT for part in columns]
    cat = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: part.mT if name in ("o", "down") else part for name, part in cat.items()}
