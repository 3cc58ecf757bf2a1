"""Norms over tensors that are spread over ranks, each element counted once."""

from __future__ import annotations

from collections.abc import Sequence

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
