"""What Newton-Schulz was given and what it made of it, measured from time to time."""

from __future__ import annotations

import torch
from torch import Tensor


def spectrum(X: Tensor, update: Tensor, gain: float) -> Tensor:
    """Three numbers for each matrix X and its update, `gain` times an orthogonal matrix.

    1. The sum of squares of the update.
    2. The effective rank of X as a share of the full rank: with singular values s it is
       (sum s^2)^2 / (n sum s^4), one for an orthogonal matrix and 1/n for one of rank one.
    3. The root mean square distance of the squared singular values of update / gain from one.

    It takes two Gram matrices, in the type of the update.

    Shapes: X, update [n, r, c] -> [n, 3], fp64.

    Source: 2. is the participation ratio of the spectrum of X X^T.
    """
    short = min(X.shape[-2:])
    normal = X / X.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    before, after = _gram(normal.to(update.dtype)), _gram(update / gain)
    trace = before.diagonal(dim1=-2, dim2=-1).sum(-1)
    rank = trace.square() / before.square().sum((-2, -1)).clamp_min(1e-300) / short
    error = (after - torch.eye(short, device=X.device)).square().sum((-2, -1)) / short
    return torch.stack([update.double().square().sum((-2, -1)), rank, error.sqrt()], dim=-1)


def _gram(X: Tensor) -> Tensor:
    wide = X if X.shape[-2] <= X.shape[-1] else X.mT
    return (wide @ wide.mT).double()


def sizes(
    prefix: str, lr: float, *, update: Tensor, weights: Tensor, count: int | Tensor
) -> dict[str, Tensor]:
    """Root mean square of an update, and its size relative to the weights, from sums of squares."""
    return {
        f"{prefix}/update_rms": lr * (update / count).sqrt(),
        f"{prefix}/update_to_weight": lr * (update / weights).sqrt(),
    }
