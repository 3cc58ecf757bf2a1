import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_like.ops.packing import rows_of
from nemo_like.types import Example, TrainBatch


def batch_of(lengths):
    first = 1
    examples = []
    for length in lengths:
        tokens = tuple(range(first, first + length))
        examples.append(Example(tokens, (False, *[True] * (length - 1))))
        first += length
    return TrainBatch.of(examples)


def test_packed_row_restarts_positions_and_pads_at_its_end():
    rows = rows_of(batch_of([3, 2, 2]), ((0, 1), (2,)), multiple=4)
    assert rows.input_ids_RT.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 0, 0, 0, 0, 0, 0]]
    assert rows.position_ids_RT.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_predictor_is_the_position_before_its_target():
    rows = rows_of(batch_of([3, 2]), ((0,), (1,)))
    assert rows.target_M.tolist() == [2, 3, 5]
    assert rows.predictor_M.tolist() == [0, 1, 3]
    assert rows.source_M.tolist() == [1, 2, 4]


def test_empty_micro_batch_is_one_row_without_targets():
    rows = rows_of(batch_of([3]).select([]), (), multiple=2)
    assert rows.input_ids_RT.shape == (1, 2)
    assert len(rows.target_M) == 0


@given(
    st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(1, 8),
)
def test_every_target_is_predicted_from_its_own_sequence(row_lengths, multiple):
    lengths = [length for row in row_lengths for length in row]
    batch = batch_of(lengths)
    names = iter(range(len(lengths)))
    micro_batch = tuple(tuple(next(names) for _ in row) for row in row_lengths)
    rows = rows_of(batch, micro_batch, multiple=multiple)
    width = rows.input_ids_RT.shape[1]
    flat_ids, flat_positions = rows.input_ids_RT.flatten(), rows.position_ids_RT.flatten()
    assert width % multiple == 0
    assert torch.equal(flat_ids[rows.predictor_M + 1], rows.target_M)
    assert torch.equal(flat_positions[rows.predictor_M] + 1, flat_positions[rows.predictor_M + 1])
    assert torch.equal(batch.token_ids_N[rows.source_M], rows.target_M)
    assert sorted(flat_ids[flat_ids > 0].tolist()) == batch.token_ids_N.tolist()
    # A restart of the positions is what separates sequences: there is exactly one per sequence.
    assert int((flat_positions == 0).sum()) == len(lengths)
