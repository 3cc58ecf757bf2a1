"""Odd polynomials whose composition is as near to one as it can be on an interval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

FP64 = torch.float64


def composed(
    degrees: Iterable[int], low: float, *, margin: float, top: float
) -> Iterator[tuple[float, ...]]:
    """The polynomials that take [low, 1] nearest to one, the last scaled so that `top` is reached.

    Each is the best for the interval that the one before leaves, which makes the composition the
    best of its degrees (Amsel et al., https://arxiv.org/abs/2505.16932, theorem 3.1). Before each,
    the interval is widened by `margin` on both sides, for round-off.
    """
    degrees = list(degrees)
    high = 1.0
    for i, degree in enumerate(degrees, start=1):
        row, error = nearest_to_one(degree, low * (1 - margin if i > 1 else 1), high * (1 + margin))
        low, high = 1 - error, 1 + error
        yield tuple((row * (top / high if i == len(degrees) else 1)).tolist())


def nearest_to_one(degree: int, low: float, high: float) -> tuple[torch.Tensor, float]:
    """Coefficients of x, x^3, ... of the best odd polynomial on [low, high], and its error.

    Remez's exchange: solve for equal errors of alternating sign at as many points as there are
    unknowns, move the points to where the errors are largest, again until they stay.
    """
    powers = torch.arange(1, degree + 1, 2, dtype=FP64)
    points = torch.linspace(low, high, len(powers) + 1, dtype=FP64)
    signs = (-1.0) ** torch.arange(len(points), dtype=FP64)
    while True:
        system = torch.cat([points[:, None] ** powers, signs[:, None]], dim=1)
        *row, error = torch.linalg.solve(system, torch.ones_like(points)).tolist()
        row = torch.tensor(row, dtype=FP64)
        moved = torch.cat([points[:1], _turns(row * powers), points[-1:]])
        if torch.allclose(moved, points, rtol=1e-13, atol=0):
            return row, abs(error)
        points = moved


def _turns(slope: torch.Tensor) -> torch.Tensor:
    """Where a polynomial in x^2 is zero, ascending: eigenvalues of its companion matrix."""
    companion = torch.diag(torch.ones(len(slope) - 2, dtype=FP64), -1)
    companion[:, -1] -= slope[:-1] / slope[-1]
    return torch.linalg.eigvals(companion).real.sort().values.sqrt()
