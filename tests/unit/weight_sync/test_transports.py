"""Both halves of each transport in this process: what arrives is what was sent."""

import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemo_like.errors import CheckpointError, WorkerError
from nemo_like.weight_sync.broadcast import Broadcast
from nemo_like.weight_sync.ipc import Ipc
from nemo_like.weight_sync.object_store import StoreReceiver, StoreSender
from nemo_like.weight_sync.transport import buckets

TENSORS = [
    ("bf16", torch.randn(3, 5).bfloat16()),
    ("fp32", torch.randn(7)),
    ("transposed", torch.randn(4, 6).t()),
    ("scalar", torch.tensor(2.5, dtype=torch.float64)),
    ("empty", torch.empty(0, 3)),
    ("int", torch.arange(9).reshape(3, 3)),
]
DIRECT = {"ipc": Ipc(), "broadcast": Broadcast(deadline_s=5.0)}


class Ends:
    """A sender and its receivers, that have met."""

    def __init__(self, transport, num_receivers=2):
        self.threads = ThreadPoolExecutor(1 + num_receivers)
        if transport is None:
            self.sender, self.receivers = StoreSender(), [StoreReceiver()] * num_receivers
            return
        transport = pickle.loads(pickle.dumps(transport))
        self.sender = transport.sender(0, host="127.0.0.1", num_receivers=num_receivers)
        self.receivers = [
            transport.receiver(n, num_receivers=num_receivers) for n in range(num_receivers)
        ]
        meetings = [self.threads.submit(r.meet, self.sender.address) for r in self.receivers]
        self.sender.meet()
        for meeting in meetings:
            meeting.result()

    def received(self, parcel):
        """What each receiver makes of a parcel, which arrives as bytes."""
        sent = pickle.loads(pickle.dumps([None, parcel]))
        jobs = [self.threads.submit(receiver.receive, sent) for receiver in self.receivers]
        return [job.result() for job in jobs]


@pytest.fixture(params=["object_store", *DIRECT])
def ends(request):
    ends = Ends(DIRECT.get(request.param))
    yield ends
    ends.threads.shutdown()


def same(received, sent):
    assert [name for name, _ in received] == [name for name, _ in sent]
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for (_, a), (_, b) in zip(received, sent, strict=True)
    )


def test_tensors_arrive_with_the_same_bits_types_and_shapes_and_can_be_written_to(ends):
    for received in ends.received(ends.sender.send(TENSORS)):
        assert same(received, TENSORS)
        for _, tensor in received:
            tensor.zero_()
    assert TENSORS[1][1].abs().sum() > 0, "a received tensor has memory of its own"
    ends.sender.finish()


def test_what_was_received_stays_while_more_buckets_come_of_whatever_size(ends):
    sent = [[("w", torch.full((size,), float(size)))] for size in (5, 900, 3, 4000, 1)]
    taken = [ends.received(ends.sender.send(bucket)) for bucket in sent]
    ends.sender.finish()
    for bucket, arrivals in zip(sent, taken, strict=True):
        assert all(same(received, bucket) for received in arrivals)
    again = ends.received(ends.sender.send(TENSORS))
    assert all(same(received, TENSORS) for received in again), "the halves can be used again"
    ends.sender.finish()


def test_a_tensor_that_is_not_what_was_sent_is_refused_by_name(ends):
    for damage in ({"digest": "another"}, {"dtype": torch.int32}):
        parcel = ends.sender.send([("w", torch.ones(4))])
        (label,) = parcel.labels
        damaged = dataclasses.replace(parcel, labels=(dataclasses.replace(label, **damage),))
        with pytest.raises(CheckpointError, match="w was damaged on its way"):
            ends.received(damaged)


def test_a_damaged_byte_is_noticed():
    parcel = StoreSender().send([("w", torch.ones(4))])
    parcel.raw[5] ^= 1
    with pytest.raises(CheckpointError, match="w was damaged on its way"):
        StoreReceiver().receive([parcel])


@pytest.mark.parametrize("max_bytes", [1, 16, 40, 10_000])
def test_buckets_keep_the_order_and_the_bound_and_a_larger_tensor_travels_alone(max_bytes):
    found = list(buckets(iter(TENSORS), max_bytes))
    assert [name for bucket in found for name, _ in bucket] == [name for name, _ in TENSORS]
    for bucket in found:
        assert bucket and (len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= max_bytes)


def test_only_the_rank_that_has_something_to_send_has_a_half():
    for transport in DIRECT.values():
        assert transport.sender(1, host="127.0.0.1", num_receivers=1) is None


def test_memory_of_a_process_that_is_not_here_is_refused_with_the_key():
    ends = Ends(Ipc())
    parcel = ends.sender.send([("w", torch.ones(4))])
    with pytest.raises(WorkerError, match=r"refit_transport=ipc: this engine can not open"):
        ends.received(dataclasses.replace(parcel, handle=(2**22 + 1, 3, 16)))
    with pytest.raises(WorkerError, match="is on cpu, and the policy's weights are on GPU 5"):
        ends.received(dataclasses.replace(parcel, device="GPU 5"))


def test_a_broadcast_that_nobody_takes_breaks_the_group_in_bounded_time_and_for_good():
    ends = Ends(Broadcast(deadline_s=2.0))
    parcel = ends.sender.send([("w", torch.ones(1 << 20))])
    with pytest.raises(WorkerError, match="the group broke.*Timed out waiting 2000ms"):
        ends.sender.finish()
    with pytest.raises(WorkerError, match="the group broke"):
        ends.received(parcel)
    with pytest.raises(WorkerError, match="the group broke before"):
        ends.sender.send([("w", torch.ones(4))])
    with pytest.raises(WorkerError, match="the group broke before"):
        ends.received(parcel)


def test_a_broadcast_leaves_the_groups_of_torch_alone():
    assert not torch.distributed.is_initialized()
    ends = Ends(Broadcast(), num_receivers=1)
    assert same(ends.received(ends.sender.send(TENSORS))[0], TENSORS)
    assert not torch.distributed.is_initialized()
    ends.sender.close()
    ends.sender.close()
