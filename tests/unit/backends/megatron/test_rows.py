"""Context-parallel ranks have parts of rows that together are the rows."""

from __future__ import annotations

import pytest
import torch

from nemo_like.backends.megatron.rows import local_rows
from nemo_like.ops.packing import rows_of
from nemo_like.types import Example, TrainBatch

LENGTHS = (5, 3, 9, 2, 7)
PACKED = ((0, 1), (2,), (3, 4))
PLAIN = ((0,), (1,), (2,), (3,), (4,))


def rows(micro_batch, multiple):
    examples = [
        Example(tuple(range(100 * i + 1, 100 * i + 1 + n)), (False, *[True] * (n - 1)))
        for i, n in enumerate(LENGTHS)
    ]
    return rows_of(TrainBatch.of(examples), micro_batch, multiple=multiple)


def parts(whole, num_ranks):
    cpu = torch.device("cpu")
    return [local_rows(whole, rank=r, num_ranks=num_ranks, device=cpu) for r in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [PACKED, PLAIN])
def test_each_target_is_on_one_rank_and_stands_after_its_predictor(micro_batch, num_ranks):
    whole = rows(micro_batch, 2 * num_ranks)
    places = []
    for part in parts(whole, num_ranks):
        tokens_tR = part.input_ids_Rt.T
        # A sequence's token ids count up from one to the next.
        assert torch.equal(tokens_tR.flatten()[part.predictor_m] + 1, part.target_m)
        assert torch.equal(whole.target_M[part.place_m], part.target_m)
        places += part.place_m.tolist()
    assert sorted(places) == list(range(len(whole.target_M)))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [PACKED, PLAIN])
def test_every_query_sees_its_own_sequence_up_to_itself_and_nothing_else(micro_batch, num_ranks):
    whole = rows(micro_batch, 2 * num_ranks)
    num_rows, width = whole.input_ids_RT.shape
    position = whole.position_ids_RT
    start = torch.arange(width) - position
    for part in parts(whole, num_ranks):
        positions_tR = part.positions_tR.expand(-1, num_rows)
        seen_rows = []
        for group, pieces in part.pieces:
            for row in range(num_rows)[group]:
                seen_rows.append(row)
                ends = [0, *(piece.queries.stop for piece in pieces)]
                assert [piece.queries.start for piece in pieces] == ends[:-1]
                assert ends[-1] == part.input_ids_Rt.shape[1]
                for piece in pieces:
                    queries = range(piece.queries.start, piece.queries.stop)
                    for key_end, query in zip(
                        range(piece.keys.stop - len(queries) + 1, piece.keys.stop + 1),
                        queries,
                        strict=True,
                    ):
                        column = key_end - 1  # the last key that it sees is itself
                        assert part.input_ids_Rt[row, query] == whole.input_ids_RT[row, column]
                        assert positions_tR[query, row] == position[row, column]
                        assert piece.keys.start == start[row, column]
        assert seen_rows == list(range(num_rows))


def test_rows_of_single_sequences_share_one_attention_and_packed_ones_do_not():
    (plain,), (packed,) = parts(rows(PLAIN, 1), 1), parts(rows(PACKED, 1), 1)
    assert [len(pieces) for _, pieces in plain.pieces] == [1]
    assert [len(pieces) for _, pieces in packed.pieces] == [2, 1, 2]
    assert plain.positions_tR.shape == (9, 1) and packed.positions_tR.shape == (9, 3)


def test_ranks_share_the_work_of_a_long_sequence_evenly():
    whole = rows_of(TrainBatch.of([Example((1,) * 64, (False,) * 64)]), ((0,),))
    work = []
    for part in parts(whole, 4):
        ((_, pieces),) = part.pieces
        lengths = [piece.queries.stop - piece.queries.start for piece in pieces]
        # The last query sees all keys, and each one before it one fewer.
        work.append(
            sum(
                n * piece.keys.stop - n * (n - 1) // 2
                for n, piece in zip(lengths, pieces, strict=True)
            )
        )
    assert work == [64 * 65 // 2 // 4] * 4


def test_what_is_no_token_is_marked_but_not_in_a_micro_batch_without_tokens():
    (part,) = parts(rows(PACKED, 4), 1)
    assert (~part.padding_Rt).sum(1).tolist() == [8, 9, 9]
    nothing = TrainBatch.of([Example((1, 2), (False, True))]).select([])
    (empty,) = parts(rows_of(nothing, (), multiple=4), 1)
    assert empty.input_ids_Rt.shape == (1, 4) and not empty.padding_Rt.any()
    assert empty.num_targets == 0
