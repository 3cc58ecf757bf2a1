"""The orthogonal polar factor of a matrix by Newton-Schulz iteration, and its schedules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_like.config.optimizer import NEWTON_SCHULZ_STEPS, CoefficientType
from nemo_like.errors import ConfigError

Polynomial = tuple[float, ...]
"""One step X <- aX + (bA + cA^2 + ...)X with A = XX^T: s becomes as + bs^3 + cs^5 + ..."""


@dataclass(frozen=True, slots=True)
class CoefficientSet:
    """The rows of one schedule, as published.

    `tail` says what steps past the last row do. `safety` shrinks the input of every step: step
    polynomials that touch their bounds at the edge of the interval send a singular value that
    round-off pushed over the edge to infinity within a few steps.
    """

    rows: tuple[Polynomial, ...]
    safety: float = 1.0


_SIMPLE: Polynomial = (3.4445, -4.7750, 2.0315)

SCHEDULES: dict[str, CoefficientSet] = {
    # Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/; singular values end in
    # [.68, 1.13].
    "simple": CoefficientSet((_SIMPLE,)),
    # Source: You Jiacheng, https://x.com/YouJiacheng/status/1905861218138804534; optimised as a
    # whole, so five steps or nothing: they end in [.978, 1.032], a sixth would end in [.06, .17].
    "quintic": CoefficientSet(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
    ),
    # Source: Amsel et al., The Polar Express, https://arxiv.org/abs/2505.16932; the rows as
    # NVIDIA's Emerging-Optimizers rounds them, with the paper's safety factor 1.01 inside.
    "polar_express": CoefficientSet(
        (
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.8750, -1.2500, 0.3750),
        ),
    ),
    # Source: Grishina et al., Chebyshev-accelerated Newton-Schulz,
    # https://arxiv.org/abs/2506.10935. Changed: a safety factor; without it a matrix of rank one
    # ends at 676 in bf16 and at 1.8 in fp32.
    "cans": CoefficientSet(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        safety=1.01,
    ),
    # Source: https://arxiv.org/abs/2606.00371; cubic steps, so one matrix product fewer in each.
    # Changed: a safety factor; without it round-off shrinks a constant matrix in bf16 to a quarter.
    "cubic5": CoefficientSet(
        (
            (3.3656576, -3.3420992),
            (2.5744352, -1.4957376),
            (2.5368962, -1.4312570),
            (2.4418906, -1.2764040),
            (2.2230472, -0.9630650),
        ),
        safety=1.01,
    ),
    # Ours: four steps, each the polynomial nearest to one on what the step before leaves of
    # [.002, 1] (the optimum: theorem 3.1 of The Polar Express), and on 1 % around it for round-off;
    # derived again in tests/reference/minimax.py. Singular values from .01 on end in [.83, 1.12],
    # inside of where five steps of `simple` take them; smaller ones grow as fast (491 times).
    "minimax": CoefficientSet(
        (
            (8.3442, -24.2061, 17.5975),
            (5.5849, -8.075, 3.7074, -0.5082),
            (3.5427, -2.6055, 0.508),
            (2.9759, -3.7724, 2.0362, -0.3565),
        ),
    ),
    # Source: DeepSeek-V4; eight steps of `simple`, then two that converge: [1.000, 1.001].
    "deepseekv4": CoefficientSet((_SIMPLE,) * 8 + ((2.0, -1.5, 0.5),) * 2),
}

BLOCK = 192
"""Columns of a symmetric product that are computed together."""

# Source: Fan et al., Rethinking Muon Beyond Pretraining, https://arxiv.org/abs/2605.19282, their
# section 5 and appendix E, and `pion.py` of https://github.com/OPTML-Group/Pion.
# Both keep one at one, where they are flat. Promotion lifts what is below it (the Newton-Schulz
# step of highest order); suppression has slope zero at zero and divides the others further.
PROMOTION: Polynomial = (1.875, -1.25, 0.375)
SUPPRESSION: Polynomial = (0.0, 2.5, -1.5)


def coefficients(
    schedule: CoefficientType,
    steps: int,
    custom: tuple[Polynomial, ...] = (),
    promotion: int | None = None,
) -> tuple[Polynomial, ...]:
    """The polynomials of `steps` Newton-Schulz steps, safety factor applied.

    `custom` are the rows of the schedule of that name. `promotion` is the number of opening steps
    of `pion`, none where it is left open; the rest suppress. Pion does not orthogonalise: it is a
    filter that takes singular values near the norm of the matrix to one and the others to zero.
    Half is left at .80, .49, .26, .13 and .06 of the norm with 0 to 4 promotions, a tenth at .77,
    .45, .22, .09 and .03. A matrix whose spectrum is below that everywhere hardly moves.

    Raises:
        ConfigError: the schedule was not made for this number of steps.
    """
    if steps not in NEWTON_SCHULZ_STEPS[schedule]:
        raise ConfigError(
            f"muon_num_ns_steps={steps} does not fit muon_coefficient_type={schedule}, which was "
            f"made for {NEWTON_SCHULZ_STEPS[schedule]}"
        )
    if schedule == "custom":
        return custom
    if schedule == "pion":
        promoted = promotion or 0
        return (PROMOTION,) * promoted + (SUPPRESSION,) * (steps - promoted)
    chosen = SCHEDULES[schedule]
    rows = chosen.rows[:steps] + chosen.rows[-1:] * (steps - len(chosen.rows))
    s = chosen.safety
    return tuple(tuple(c / s ** (2 * i + 1) for i, c in enumerate(row)) for row in rows)


def polar(
    X: Tensor,
    *,
    rows: tuple[Polynomial, ...],
    dtype: torch.dtype,
    gain: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """The approximate polar factor U V^T of each matrix X = U S V^T, times `gain`, in `dtype`.

    It does not depend on the scale of X, down to the smallest normal number; a zero matrix gives
    zero, and a matrix with a NaN or an infinity gives NaN. Matrices that `keep` is false for give
    zero, on the device, without asking it (on a GPU NaN where they are not finite).

    Shapes: X [..., R, C] -> [..., R, C]; keep [...], bool.

    Source: Jordan et al., https://kellerjordan.github.io/posts/muon/. Changed: normalised before
    the cast to `dtype`, by a norm without an epsilon under it, which silently shrinks the update of
    a tiny gradient.
    """
    # A step is linear in its coefficients, so the gain costs nothing in the last one.
    rows = (*rows[:-1], tuple(gain * coefficient for coefficient in rows[-1]))
    if X.device.type != "cpu":
        keep = None if keep is None else keep.flatten()
        return _steps(_normalized(_listed(X), keep).to(dtype), rows).view(X.shape)
    # There one by one: batched products of transposed matrices run at two thirds of the speed.
    results = X.new_empty(X.shape, dtype=dtype)
    every = [True] * X.shape[:-2].numel() if keep is None else keep.flatten().tolist()
    for one, kept, result in zip(_listed(X), every, _listed(results), strict=True):
        if kept:
            _steps(_normalized(one).to(dtype), rows, out=result)
        else:
            result.zero_()
    return results


def _listed(X: Tensor) -> Tensor:
    return X.reshape(-1, *X.shape[-2:])


def _normalized(X: Tensor, keep: Tensor | None = None) -> Tensor:
    """Each matrix divided by its Frobenius norm; zero stays zero, and so does what is not kept."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    large = 2.0**256 if X.dtype == torch.float64 else 2.0**32
    norm = _norm(X)
    # To ask a GPU for numbers would be to wait for it, so there the rest is always done.
    if X.device.type != "cpu" or not all(1 / large < n < large for n in norm.flatten().tolist()):
        # Farther out squares overflow or vanish; a power of two brings them back unchanged.
        scale = torch.ones_like(norm).masked_fill_(norm > large, large**-3)
        X = X * scale.masked_fill_(norm < 1 / large, large**3)
        norm = _norm(X).clamp_(min=torch.finfo(X.dtype).tiny)
    if keep is not None:
        norm = torch.where(keep[..., None, None], norm, torch.inf)
    return X / norm


def _norm(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)


def _steps(X: Tensor, rows: tuple[Polynomial, ...], out: Tensor | None = None) -> Tensor:
    """The steps on one matrix [R, C], or on a batch [B, R, C] at once."""
    tall = X.shape[-2] > X.shape[-1]
    for i, (a, *higher) in enumerate(rows, start=1):
        A = gram(X)
        # Horner's scheme: bA + cA^2 is (b + cA) A.
        step, alpha = A, higher.pop()
        while higher:
            step, alpha = _symmetric(A, step, A, beta=higher.pop(), alpha=alpha), 1.0
        factors = (X, step) if tall else (step, X)
        X = _product(*factors, X, beta=a, alpha=alpha, out=out if i == len(rows) else None)
    return X


def gram(X: Tensor) -> Tensor:
    """The smaller of XX^T and X^TX: a tall matrix is not transposed in memory, only in effect.

    Shapes: X [R, C], or a batch [B, R, C] at once -> [..., s, s] with s = min(R, C).
    """
    return _symmetric(*((X.mT, X) if X.shape[-2] > X.shape[-1] else (X, X.mT)))


def _product(
    P: Tensor,
    Q: Tensor,
    S: Tensor | None,
    *,
    beta: float,
    alpha: float,
    out: Tensor | None = None,
) -> Tensor:
    """The matrices beta S + alpha PQ, or PQ without an S."""
    if S is None:
        return P @ Q
    add = torch.addmm if P.ndim == 2 else torch.baddbmm
    return add(S, P, Q, beta=beta, alpha=alpha, out=out)


def _symmetric(
    P: Tensor, Q: Tensor, S: Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """A product that is known to be symmetric: of one large matrix, half of it is mirrored."""
    side = P.shape[-2]
    if P.ndim > 2 or side < 2 * BLOCK:
        return _product(P, Q, S, beta=beta, alpha=alpha)
    whole = P.new_empty(side, side)
    for start in range(0, side, BLOCK):
        stop = min(start + BLOCK, side)
        added = None if S is None else S[start:, start:stop]
        block = _product(P[start:], Q[:, start:stop], added, beta=beta, alpha=alpha)
        whole[start:, start:stop] = block
        whole[start:stop, stop:] = block[stop - start :].mT
    return whole
