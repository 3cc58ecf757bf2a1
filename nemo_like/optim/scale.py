"""How large the orthogonal update of a matrix is made, and what the same word means elsewhere."""

from __future__ import annotations

import math

from nemo_like.config.optimizer import ScaleMode


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
