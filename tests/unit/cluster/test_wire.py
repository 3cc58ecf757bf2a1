import dataclasses
import pickle

import pytest
import torch

from nemo_like.cluster.wire import chunked, from_wire, to_wire
from nemo_like.errors import CheckpointError

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


@pytest.mark.parametrize("damage", ["a byte", "the type"])
def test_a_tensor_that_is_not_what_was_sent_is_refused_by_name(damage):
    (sent,) = to_wire([("w", torch.ones(4))])
    raw = sent.raw.copy()
    raw[5] ^= 1
    arrived = {
        "a byte": dataclasses.replace(sent, raw=raw),
        "the type": dataclasses.replace(sent, dtype=torch.int32),
    }[damage]
    with pytest.raises(CheckpointError, match="w was damaged on its way"):
        from_wire([arrived])
