"""megatron-core's parameters as Hugging Face tensors: weights in, weights out, checkpoints.

Each rank says which blocks of which parameters it holds; the table says what these are. So nothing
here depends on what cut the parameters: tensor, pipeline, expert or data parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_like.backends.hf_models import Sliceable
from nemo_like.backends.megatron.convert import Piece, WeightTable
from nemo_like.checkpoint.boxes import BoxedTensor
from nemo_like.optim.layout import Shape

Box = tuple[str, Shape, Shape]
"""A Hugging Face name, and offset and shape of a box in it."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalBlock:
    """What a rank holds of a whole parameter, live: the block at this offset."""

    tensor: Tensor
    offset: Shape


def local_blocks(
    table: WeightTable, tensors: Mapping[str, Tensor], *, tp_rank: int, expert_tp_rank: int
) -> dict[str, LocalBlock]:
    """The blocks that this tensor-parallel rank's parameters are, by their global names."""
    blocks: dict[str, LocalBlock] = {}
    for name, tensor in tensors.items():
        rank = expert_tp_rank if table.entries[name].is_expert else tp_rank
        offset, shape = table.local_box(name, rank)
        assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} is not {shape}"
        blocks[name] = LocalBlock(tensor.detach(), offset)
    return blocks


@torch.no_grad()
def load_weights(
    table: WeightTable,
    blocks: Mapping[str, LocalBlock],
    weights: Iterable[tuple[str, Sliceable]],
) -> None:
    """Fill the blocks from all Hugging Face tensors, one after the other; padding becomes zero."""
    parts: dict[str, list[tuple[Piece, Tensor]]] = {}
    for name, block in blocks.items():
        pieces = _pieces(table, name, block)
        for piece in pieces:
            parts.setdefault(piece.hf_name, []).append((piece, _rows(block, piece)))
        block.tensor[sum(piece.shape[0] for piece in pieces) :].zero_()
    for hf_name, whole in weights:
        for piece, rows in parts.pop(hf_name, ()):
            rows.copy_(whole[_slices(piece.offset, piece.shape)])
    assert not parts, f"the weights lack {', '.join(parts)}"


def canonical(table: WeightTable, blocks: Mapping[str, LocalBlock]) -> dict[str, BoxedTensor]:
    """What this rank holds of each Hugging Face tensor, live, for a checkpoint.

    All ranks' boxes cover all tensors. Copies of one box hold the same numbers.
    """
    boxes: dict[str, dict[Shape, Tensor]] = {}
    for name, block in blocks.items():
        for piece in _pieces(table, name, block):
            boxes.setdefault(piece.hf_name, {})[piece.offset] = _rows(block, piece)
    return {
        hf_name: BoxedTensor(table.hf_shapes[hf_name], next(iter(own.values())).dtype, own)
        for hf_name, own in boxes.items()
    }


class WholeWeights:
    """Whole Hugging Face tensors from the blocks of all ranks; iterating is a collective.

    All ranks make one and iterate alike; without a process group that is this one alone.
    """

    def __init__(self, table: WeightTable, blocks: Mapping[str, LocalBlock]) -> None:
        """See the class; a collective too.

        Raises:
            ValueError: the blocks do not cover every tensor exactly.
        """
        self._table = table
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._boxes: dict[Box, Tensor] = {}
        devices = [block.tensor.device for block in blocks.values()]
        self._device = devices[0] if devices else torch.device("cpu")
        for name, block in blocks.items():
            for piece in _pieces(table, name, block):
                self._boxes[_box(piece)] = _rows(block, piece)
        self._owners = _owners(table, blocks)

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """fp32 tensors in the order of the model, one at a time, on every rank."""
        for hf_name, shape in self._table.hf_shapes.items():
            whole = torch.zeros(shape, device=self._device)
            owners = self._owners[hf_name]
            for box, owner in owners.items():
                if owner == self._rank:
                    whole[_slices(*box[1:])] = self._boxes[box].float()
            self._put_together(whole, set(owners.values()))
            yield hf_name, whole

    def _put_together(self, whole: Tensor, owners: set[int]) -> None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        if len(owners) == 1:
            dist.broadcast(whole, src=owners.pop())
        else:
            # Each number is on one rank, and zeros are on the others: as integers their sum has
            # its bits, which a sum of floats would not have of -0.0.
            dist.all_reduce(whole.view(torch.int32))


def _owners(table: WeightTable, blocks: Mapping[str, LocalBlock]) -> dict[str, dict[Box, int]]:
    """By Hugging Face name: all boxes of it, and of each the first rank that holds it."""
    held = {name: (block.offset, tuple(block.tensor.shape)) for name, block in blocks.items()}
    gathered = [held]
    if dist.is_initialized():
        gathered = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, held)
    owners: dict[str, dict[Box, int]] = {hf_name: {} for hf_name in table.hf_shapes}
    for rank, of_rank in enumerate(gathered):
        for name, (offset, shape) in of_rank.items():
            for piece in table.pieces(name, offset, shape):
                owners[piece.hf_name].setdefault(_box(piece), rank)
    for hf_name, boxes in owners.items():
        count = sum(math.prod(shape) for _, _, shape in boxes)
        expected = math.prod(table.hf_shapes[hf_name])
        if count != expected:
            raise ValueError(f"the ranks' blocks hold {count} of {hf_name}'s {expected} elements")
    return owners


def _pieces(table: WeightTable, name: str, block: LocalBlock) -> list[Piece]:
    return table.pieces(name, block.offset, tuple(block.tensor.shape))


def _rows(block: LocalBlock, piece: Piece) -> Tensor:
    return block.tensor[piece.start : piece.start + piece.shape[0]]


def _box(piece: Piece) -> Box:
    return piece.hf_name, piece.offset, piece.shape


def _slices(offset: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
