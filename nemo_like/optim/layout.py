"""Who holds which block of a tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

# Private to torch, and the only function that knows the shards of every rank without asking them;
# tests/unit/optim/test_layout.py holds it against what DTensor does.
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a tensor, and the ranks that hold a copy of it, in ascending order."""

    offset: Shape
    shape: Shape
    holders: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The blocks that make up a tensor of this shape; none is empty and no two overlap.

    `ranks` are all that take part, those with an empty share too.
    """

    shape: Shape
    blocks: tuple[Block, ...]
    ranks: tuple[int, ...]

    def held_by(self, rank: int) -> Block | None:
        """The block that a rank holds."""
        return next((block for block in self.blocks if rank in block.holders), None)


def layout_on(shape: Sequence[int], mesh: Tensor, placements: Sequence[Placement]) -> Layout:
    """The layout of a tensor over a mesh, worked out without any process.

    `mesh` holds a rank at each coordinate, and has one dimension per placement.

    Raises:
        ValueError: the placements leave partial sums, or shards that are no boxes.
    """
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"placements {tuple(placements)} hold partial sums; reduce them first")
    holders: dict[tuple[Shape, Shape], list[int]] = {}
    coordinates = itertools.product(*map(range, mesh.shape))
    for coordinate, rank in zip(coordinates, mesh.flatten().tolist(), strict=True):
        local_shape, offset = _compute_local_shape_and_global_offset(
            tuple(shape), tuple(mesh.shape), list(coordinate), placements
        )
        if math.prod(local_shape):
            holders.setdefault((tuple(offset), tuple(local_shape)), []).append(rank)
    blocks = tuple(Block(o, s, tuple(sorted(ranks))) for (o, s), ranks in holders.items())
    if not _is_grid(shape, blocks):
        raise ValueError(
            f"placements {tuple(placements)} on a mesh of {tuple(mesh.shape)} cut a tensor of "
            f"{tuple(shape)} into shards that are no boxes, expected contiguous ones"
        )
    return Layout(tuple(shape), blocks, tuple(sorted(mesh.flatten().tolist())))


def _is_grid(shape: Sequence[int], blocks: Sequence[Block]) -> bool:
    """Whether blocks are all the boxes of a grid: each element in one of them, and in one only."""
    number = 1
    for dim, length in enumerate(shape):
        intervals = sorted({(block.offset[dim], block.shape[dim]) for block in blocks})
        ends = [start + size for start, size in intervals]
        if [start for start, _ in intervals] != [0, *ends[:-1]] or ends[-1:] != [length]:
            return False
        number *= len(intervals)
    return number == len(blocks)


def layout_of(tensor: Tensor, over: DeviceMesh | None = None) -> Layout:
    """The layout of a tensor, sharded or not.

    `over` is the mesh of the whole program, if there is one: along those of its dimensions that a
    tensor does not know, ranks hold copies. Without it a tensor that is no DTensor is this rank's
    own, and a DTensor that of its mesh, and no other ranks hold copies of them.
    """
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
    elif over is not None:
        return layout_on(tensor.shape, over.mesh, [Replicate()] * over.ndim)
    else:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return layout_on(tensor.shape, torch.tensor([rank]), [Replicate()])
    if over is None or mesh == over:
        return layout_on(tensor.shape, mesh.mesh, placements)
    names, all_names = mesh.mesh_dim_names or (), over.mesh_dim_names or ()
    if not names or [name for name in all_names if name in names] != list(names):
        raise ValueError(f"a mesh of dimensions {names} is no part of one of {all_names}")
    known = dict(zip(names, placements, strict=True))
    return layout_on(tensor.shape, over.mesh, [known.get(n, Replicate()) for n in all_names])
