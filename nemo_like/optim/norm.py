"""Norms over tensors that live on different device meshes, each element counted once."""

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
    """The sum of squares of this rank's part of each tensor, in fp64. Shapes: [len(tensors)]."""
    return torch.stack(torch._foreach_norm([local(t) for t in tensors])).double().square_()


def total_over_shards(sums: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The sum of `sums` over ranks and tensors, where entry i is of this rank's part of tensor i.

    Tensors are put together by the process groups they are sharded over, so this takes one small
    all-reduce per group: one for FSDP, two for FSDP with tensor parallelism. Every rank must call
    it.

    Shapes: sums [..., len(tensors)] -> [...].

    Raises:
        ValueError: a tensor holds partial sums, which have no norm before they are reduced.
    """
    kinds = [_shard_groups(tensor) for tensor in tensors]
    distinct = list(dict.fromkeys(kinds))
    index = torch.tensor([distinct.index(kind) for kind in kinds], device=sums.device)
    totals = sums.new_zeros(*sums.shape[:-1], len(distinct)).index_add_(-1, index, sums)
    for group in dict.fromkeys(group for kind in distinct for group in kind):
        if group.size() == 1:
            continue
        sharded = torch.tensor([group in kind for kind in distinct], device=sums.device)
        reduced = totals.clone()
        dist.all_reduce(reduced, group=group)
        totals = torch.where(sharded, reduced, totals)
    return totals.sum(-1)


def _shard_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which the elements of a tensor are divided."""
    if not isinstance(tensor, DTensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} with placements {tensor.placements} holds "
            "partial sums; reduce it first"
        )
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(i) for i, p in enumerate(tensor.placements) if not p.is_replicate())
