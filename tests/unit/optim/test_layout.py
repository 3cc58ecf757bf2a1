"""Layouts say what DTensor does, on meshes that need no processes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from nemo_like.optim.layout import layout_of, layout_on

SHAPES = [(64, 64), (65, 48), (48, 130), (3, 40), (2, 7), (5, 6, 8)]
MESHES = {
    "rows over 4": ((4,), [Shard(0)]),
    "columns over 3": ((3,), [Shard(1)]),
    "copies of rows": ((2, 2), [Replicate(), Shard(0)]),
    "rows, then columns": ((2, 3), [Shard(0), Shard(1)]),
    "tensor-parallel rows inside of FSDP": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    "rows, then rows again": ((2, 2), [Shard(0), Shard(0)]),
}


def by_cutting(shape, mesh_shape, placements):
    """The numbers of the elements that each coordinate holds, by cutting an actual tensor."""
    whole = torch.arange(math.prod(shape)).view(shape)
    for coordinate in itertools.product(*map(range, mesh_shape)):
        part = whole
        order = list(enumerate(placements))
        if isinstance(placements[0], _StridedShard):
            order.reverse()  # FSDP cuts what tensor parallelism has cut before
        for dim, placement in order:
            if not isinstance(placement, Replicate):
                pieces = part.chunk(mesh_shape[dim], dim=placement.dim)
                empty = part.narrow(placement.dim, 0, 0)
                part = pieces[coordinate[dim]] if coordinate[dim] < len(pieces) else empty
        yield coordinate, part


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MESHES)
def test_a_layout_holds_what_cutting_a_tensor_gives(name, shape):
    mesh_shape, placements = MESHES[name]
    mesh = torch.arange(math.prod(mesh_shape)).view(mesh_shape)
    layout = layout_on(shape, mesh, placements)
    whole = torch.arange(math.prod(shape)).view(shape)
    held = {rank: torch.empty(0, dtype=torch.long) for rank in layout.ranks}
    for block in layout.blocks:
        box = whole[tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))]
        for rank in block.holders:
            assert not len(held[rank]), "a rank holds two blocks"
            held[rank] = box.flatten()
    for coordinate, part in by_cutting(shape, mesh_shape, placements):
        assert torch.equal(held[int(mesh[coordinate])], part.flatten())


def test_a_tensor_that_is_not_distributed_is_this_process_own():
    layout = layout_of(torch.ones(3, 4))
    assert [(b.offset, b.shape, b.holders) for b in layout.blocks] == [((0, 0), (3, 4), (0,))]


def test_partial_sums_have_no_layout():
    with pytest.raises(ValueError, match="partial sums"):
        layout_on((4, 4), torch.arange(2), [Partial()])


def test_shards_that_are_no_boxes_are_refused():
    # Rows 0, 1, 4, 5 on the first rank: what a strided shard means without its other half.
    placements = [_StridedShard(0, split_factor=2), Replicate()]
    with pytest.raises(ValueError, match="expected contiguous"):
        layout_on((8, 4), torch.arange(4).view(2, 2), placements)
