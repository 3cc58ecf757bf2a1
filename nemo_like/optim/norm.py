"""Norms over tensors that are spread over ranks, each element counted once; and their limit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of this rank's part of each tensor, in fp64.

    Shapes: [len(tensors)].

    Raises:
        ValueError: a tensor holds partial sums, which have no norm before they are reduced.
    """
    for tensor in tensors:
        if isinstance(tensor, DTensor) and any(p.is_partial() for p in tensor.placements):
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} with placements {tensor.placements} "
                "holds partial sums; reduce it first"
            )
    return torch.stack(torch._foreach_norm([local(t) for t in tensors])).double().square_()


def total_over_ranks(sums: Tensor, copies: Sequence[int]) -> Tensor:
    """The sum of `sums` over tensors and all ranks, the same on each of them.

    Entry i is of this rank's part of tensor i, of which `copies[i]` ranks hold the same. Ranks may
    hold different tensors, or none. A collective: one small all-reduce over all ranks.

    Shapes: sums [..., n] -> [...].
    """
    total = (sums / sums.new_tensor(copies)).sum(-1)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


@torch.no_grad()
def clip_gradients(groups: Iterable[Mapping[str, Any]], max_norm: float | None) -> float:
    """The norm of all gradients together, before it was brought down to `max_norm`.

    `groups` are those of a `CombinedOptimizer`, which know how many ranks hold a copy of each
    parameter's part. One whose `clip` is false counts in the norm and is not scaled: Muon's update
    does not depend on the size of a gradient, only momentum would weigh its steps differently.

    It is the same value on every rank, and costs one wait for the device. With `max_norm=None` it
    only measures. A NaN or infinite gradient gives a NaN or infinite norm, and then nothing is
    scaled: whoever calls this looks at the value before stepping.

    Source: the factor max_norm / (norm + 1e-6) is that of `torch.nn.utils.clip_grad_norm_`.
    """
    gradients, copies, clipped = list[Tensor](), list[int](), list[Tensor]()
    device = torch.device("cpu")
    for group in groups:
        for parameter, number in zip(group["params"], group["copies"], strict=True):
            device = local(parameter).device
            if parameter.grad is not None:
                gradients.append(parameter.grad)
                copies.append(number)
                clipped += [local(parameter.grad)] if group.get("clip", True) else []
    # Every rank takes part in the sum, whatever gradients it has itself.
    squares = torch.zeros(0, dtype=torch.float64, device=device)
    if gradients:
        squares = local_squares(gradients).to(device)
    norm = float(total_over_ranks(squares, copies).sqrt())
    if max_norm is not None and math.isfinite(norm):
        factor = max_norm / (norm + 1e-6)
        if factor < 1.0 and clipped:
            torch._foreach_mul_(clipped, factor)
    return norm
