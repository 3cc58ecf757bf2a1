"""The global gradient norm, and gradients scaled down to a limit."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nemo_like.optim.norm import local, local_squares, total_over_shards


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> float:
    """The norm of all gradients together, before it was brought down to `max_norm`.

    It is the same value on every rank, for parameters on any mix of meshes, and costs one wait for
    the device. With `max_norm=None` it only measures. A NaN or infinite gradient gives a NaN or
    infinite norm, and then nothing is scaled: whoever calls this looks at the value before
    stepping.

    Source: the factor max_norm / (norm + 1e-6) is that of `torch.nn.utils.clip_grad_norm_`.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norm = float(total_over_shards(local_squares(gradients), gradients).sqrt())
    if max_norm is not None and math.isfinite(norm):
        factor = max_norm / (norm + 1e-6)
        if factor < 1.0:
            torch._foreach_mul_([local(g) for g in gradients], factor)
    return norm
