"""The global gradient norm, and gradients scaled down to a limit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nemo_like.optim.norm import local, local_squares, total_over_shards


@torch.no_grad()
def clip_gradients(groups: Iterable[Mapping[str, Any]], max_norm: float | None) -> float:
    """The norm of all gradients together, before it was brought down to `max_norm`.

    `groups` are an optimizer's. One whose `clip` is false counts in the norm and is not scaled:
    Muon's update does not depend on the size of a gradient, only momentum would weigh its steps
    differently.

    It is the same value on every rank, for parameters on any mix of meshes, and costs one wait for
    the device. With `max_norm=None` it only measures. A NaN or infinite gradient gives a NaN or
    infinite norm, and then nothing is scaled: whoever calls this looks at the value before
    stepping.

    Source: the factor max_norm / (norm + 1e-6) is that of `torch.nn.utils.clip_grad_norm_`.
    """
    gradients, clipped = [], []
    for group in groups:
        found = [p.grad for p in group["params"] if p.grad is not None]
        gradients += found
        clipped += [local(gradient) for gradient in found] if group.get("clip", True) else []
    if not gradients:
        return 0.0
    norm = float(total_over_shards(local_squares(gradients), gradients).sqrt())
    if max_norm is not None and math.isfinite(norm):
        factor = max_norm / (norm + 1e-6)
        if factor < 1.0 and clipped:
            torch._foreach_mul_(clipped, factor)
    return norm
