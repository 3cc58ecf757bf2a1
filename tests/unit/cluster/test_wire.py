import pickle

import pytest
import torch

from nemo_like.cluster.wire import chunked, from_wire, to_wire

TENSORS = [
    ("bf16", torch.randn(3, 5).bfloat16()),
    ("fp32", torch.randn(7)),
    ("transposed", torch.randn(4, 6).t()),
    ("scalar", torch.tensor(2.5, dtype=torch.float64)),
    ("empty", torch.empty(0, 3)),
    ("int", torch.arange(9).reshape(3, 3)),
]


def test_tensors_arrive_with_the_same_bits_types_and_shapes_and_can_be_written_to():
    received = from_wire(pickle.loads(pickle.dumps(to_wire(TENSORS))))
    assert [name for name, _ in received] == [name for name, _ in TENSORS]
    for (_, got), (_, sent) in zip(received, TENSORS, strict=True):
        assert got.dtype == sent.dtype and got.shape == sent.shape and torch.equal(got, sent)
        got.zero_()
    assert TENSORS[1][1].abs().sum() > 0, "a received tensor has memory of its own"


@pytest.mark.parametrize("max_bytes", [1, 16, 40, 10_000])
def test_chunks_keep_the_order_and_the_bound_and_a_larger_tensor_travels_alone(max_bytes):
    chunks = list(chunked(iter(TENSORS), max_bytes))
    assert [name for chunk in chunks for name, _ in chunk] == [name for name, _ in TENSORS]
    for chunk in chunks:
        assert chunk and (len(chunk) == 1 or sum(t.nbytes for _, t in chunk) <= max_bytes)
