"""Whole matrices from the blocks that ranks hold, and back.

Newton-Schulz on a block alone would be another optimizer, one that depends on the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from nemo_like.optim.norm import local


def on_whole_matrices(
    blocks: Sequence[Tensor],
    layouts: Sequence[Tensor],
    compute: Callable[[list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """This rank's blocks of what `compute` makes of the whole matrices.

    `blocks[i]` is this rank's part of a matrix that lies like `layouts[i]`. A collective when any
    of those is a DTensor, whatever its placements; every rank gathers every matrix and computes the
    same, on the device of the mesh: that of the result, wherever the blocks were.
    """
    wholes = [_whole(block, layout) for block, layout in zip(blocks, layouts, strict=True)]
    results = compute(wholes)
    return [_block(result, layout) for result, layout in zip(results, layouts, strict=True)]


def _whole(block: Tensor, layout: Tensor) -> Tensor:
    if not isinstance(layout, DTensor):
        return block
    return DTensor.from_local(
        block,
        layout.device_mesh,
        layout.placements,
        run_check=False,
        shape=layout.shape,
        stride=layout.stride(),
    ).full_tensor()


def _block(whole: Tensor, layout: Tensor) -> Tensor:
    if not isinstance(layout, DTensor):
        return whole
    # With no source rank every rank cuts its own block, without communication.
    return local(
        distribute_tensor(whole, layout.device_mesh, layout.placements, src_data_rank=None)
    )
