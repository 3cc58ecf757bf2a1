"""The part of a micro-batch's rows that one context-parallel rank computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_like.ops.packing import Rows


@dataclass(frozen=True)
class Piece:
    """Queries of one sequence, as local columns, and all keys up to the last of them, as columns.

    The last query sees all keys, the one before it all but the last, and so on.
    """

    queries: slice
    keys: slice


@dataclass(frozen=True)
class LocalRows:
    """A rank's columns of `Rows`, and what attention and loss need to know of them.

    Rows are cut into 2n chunks for n context-parallel ranks; rank r has chunks r and 2n - 1 - r,
    so that all ranks see about as many keys. With one rank that is the whole row.

    Shapes: R rows; t of their T columns; of M targets, m have their predictor here.
        input_ids_Rt: the model's input.
        padding_Rt: which tokens are none; false everywhere in a micro-batch without any.
        positions_tR: each token's place in its sequence; [t, 1] if that is the same in all rows.
        pieces: for some rows each, in order, what tiles all their columns, in order.
        predictor_m: flat position in t x R of the token before each target.
        target_m: the target's token id.
        place_m: which of the M targets.
    """

    input_ids_Rt: Tensor
    padding_Rt: Tensor
    positions_tR: Tensor
    pieces: tuple[tuple[slice, tuple[Piece, ...]], ...]
    predictor_m: Tensor
    target_m: Tensor
    place_m: Tensor
    num_targets: int

    qkv_format = "sbhd"
    """megatron-core asks this of what describes packed rows: here they keep their two dimensions"""


def local_rows(rows: Rows, *, rank: int, num_ranks: int, device: torch.device) -> LocalRows:
    """The columns of context-parallel rank `rank`, on a device; `rows` is on the CPU."""
    num_rows, width = rows.input_ids_RT.shape
    assert num_ranks == 1 or width % (2 * num_ranks) == 0, "see sequence_divisor"
    chunks = _chunks(width, rank, num_ranks)
    columns = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
    local_column = torch.full((width,), -1).index_put((columns,), torch.arange(len(columns)))
    predictor_row = rows.predictor_M // width
    predictor_column = local_column[rows.predictor_M % width]
    (place_m,) = (predictor_column >= 0).nonzero(as_tuple=True)
    starts = [(row == 0).nonzero().flatten().tolist() for row in rows.position_ids_RT]
    alike = all(start == starts[0] for start in starts)
    pieces = [tuple(_pieces(start, width, chunks)) for start in (starts[:1] if alike else starts)]
    groups = [slice(None)] if alike else [slice(r, r + 1) for r in range(num_rows)]
    num_tokens_R = rows.num_tokens_R if rows.num_tokens_R.any() else rows.num_tokens_R + width
    positions = rows.position_ids_RT[:1] if alike else rows.position_ids_RT

    def there(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    return LocalRows(
        input_ids_Rt=there(rows.input_ids_RT[:, columns]),
        padding_Rt=there(columns >= num_tokens_R[:, None]),
        positions_tR=there(positions[:, columns].T),
        pieces=tuple(zip(groups, pieces, strict=True)),
        predictor_m=there((predictor_column * num_rows + predictor_row)[place_m]),
        target_m=there(rows.target_M[place_m]),
        place_m=there(place_m),
        num_targets=len(rows.target_M),
    )


def _chunks(width: int, rank: int, num_ranks: int) -> list[range]:
    """The columns of a rank, as one or two ranges."""
    if num_ranks == 1:
        return [range(width)]
    size = width // (2 * num_ranks)
    return [range(c * size, (c + 1) * size) for c in (rank, 2 * num_ranks - 1 - rank)]


def _pieces(starts: list[int], width: int, chunks: list[range]) -> Iterator[Piece]:
    """The parts of sequences that are in the chunks, each with the keys that it sees."""
    offset = 0  # of a chunk among the local columns
    for chunk in chunks:
        for start, end in zip(starts, [*starts[1:], width], strict=True):
            first, last = max(start, chunk.start), min(end, chunk.stop)
            if first < last:
                local = offset - chunk.start
                yield Piece(slice(first + local, last + local), slice(start, last))
        offset += len(chunk)
