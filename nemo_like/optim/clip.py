"""The global gradient norm, and gradients scaled down to a limit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_like.optim.norm import local, local_squares, total_over_shards


@torch.no_grad()
def clip_gradients(groups: Iterable[Mapping[str, Any]], max_norm: float | None) -> float:
    """The norm of all gradients together, before it was brought down to `max_norm`.

    `groups` are an optimizer's. One whose `clip` is false counts in the norm and is not scaled:
    Muon's update does not depend on the size of a gradient, only momentum would weigh its steps
    differently.

    It is the same value on every rank, for parameters on any mix of meshes that each hold the whole
    model, and costs one wait for the device. With `max_norm=None` it only measures. A NaN or
    infinite gradient gives a NaN or infinite norm, and then nothing is scaled: whoever calls this
    looks at the value before stepping.

    Source: the factor max_norm / (norm + 1e-6) is that of `torch.nn.utils.clip_grad_norm_`.
    """
    parameters, clipped = list[Tensor](), list[Tensor]()
    for group in groups:
        parameters += group["params"]
        if group.get("clip", True):
            clipped += [local(p.grad) for p in group["params"] if p.grad is not None]
    # Every rank takes part in every sum, whatever gradients it has itself.
    gradients = [p if p.grad is None else p.grad for p in parameters]
    present = [i for i, p in enumerate(parameters) if p.grad is not None]
    squares = torch.zeros(len(parameters), dtype=torch.float64, device=_device_of(gradients))
    if present:
        squares[present] = local_squares([gradients[i] for i in present])
    norm = float(total_over_shards(squares, gradients).sqrt()) if parameters else 0.0
    if max_norm is not None and math.isfinite(norm):
        factor = max_norm / (norm + 1e-6)
        if factor < 1.0 and clipped:
            torch._foreach_mul_(clipped, factor)
    return norm


def _device_of(tensors: list[Tensor]) -> torch.device:
    return local(tensors[0]).device if tensors else torch.device("cpu")
