"""The orthogonal polar factor of a matrix by Newton-Schulz iteration, and its schedules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_like.config.optimizer import NEWTON_SCHULZ_STEPS, CoefficientType
from nemo_like.errors import ConfigError

Polynomial = tuple[float, float, float]
"""One step X <- aX + (bA + cA^2)X with A = XX^T: a singular value s becomes as + bs^3 + cs^5."""


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
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        safety=1.01,
    ),
    # Source: DeepSeek-V4; eight steps of `simple`, then two that converge: [1.000, 1.001].
    "deepseekv4": CoefficientSet((_SIMPLE,) * 8 + ((2.0, -1.5, 0.5),) * 2),
}

PROMOTION: Polynomial = (1.875, -1.25, 0.375)
SUPPRESSION: Polynomial = (0.0, 2.5, -1.5)


def coefficients(
    schedule: CoefficientType,
    steps: int,
    custom: tuple[Polynomial, ...] = (),
    promotion: int | None = None,
) -> tuple[Polynomial, ...]:
    """The polynomials of `steps` Newton-Schulz steps, safety factor applied.

    `custom` are the rows of the schedule of that name, `promotion` the number of opening steps of
    `pion`; both belong to no other schedule.

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
    return tuple((a / s, b / s**3, c / s**5) for a, b, c in rows)


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
    zero (NaN, too, where they are not finite), on the device, without asking it.

    Shapes: X [..., R, C] -> [..., R, C]; keep [...], bool.

    Source: Jordan et al., https://kellerjordan.github.io/posts/muon/. Changed: normalised before
    the cast to `dtype`, by two scale-free divisions instead of a norm with an epsilon under it,
    which silently shrinks the update of a tiny gradient.
    """
    normal = _normalized(X, keep).to(dtype)
    current = normal.reshape(-1, *normal.shape[-2:])
    tall = X.shape[-2] > X.shape[-1]
    side = min(X.shape[-2:])
    gram = current.new_empty(len(current), side, side)
    square, following = torch.empty_like(gram), torch.empty_like(current)
    # A step is linear in its coefficients, so the gain costs nothing in the last one.
    last = tuple(gain * coefficient for coefficient in rows[-1])
    for a, b, c in (*rows[:-1], last):
        # The smaller of XX^T and X^TX: a tall matrix is never transposed in memory, only in effect.
        torch.bmm(*((current.mT, current) if tall else (current, current.mT)), out=gram)
        if c == 0.0:
            step, alpha = gram, b
        else:
            step, alpha = torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=square), 1.0
        factors = (current, step) if tall else (step, current)
        torch.baddbmm(current, *factors, beta=a, alpha=alpha, out=following)
        current, following = following, current
    return current.view(X.shape)


def _normalized(X: Tensor, keep: Tensor | None) -> Tensor:
    """Each matrix divided by its Frobenius norm; zero stays zero."""
    # The largest entry goes first: squares of the rest then neither overflow nor vanish.
    largest = X.abs().amax((-2, -1), keepdim=True)
    scaled = X / torch.where(largest == 0, 1, largest)
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    if keep is not None:
        norm = torch.where(keep[..., None, None], norm, torch.inf)
    return scaled.div_(torch.where(norm == 0, 1, norm))
