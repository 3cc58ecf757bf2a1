"""What all ways from a policy to its engines have in common: two halves, and parcels between them.

A transport is one file with both halves. Its sender lives in a worker of the policy, its receiver
in a worker of the engines; what a sender returns for a bucket of weights, the parcel, reaches every
receiver by a call. It holds the bucket itself (`object_store`, which is always there and whose
parcels last), or what the receiver needs to get it (the direct transports, whose halves meet
first).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_like.errors import CheckpointError
from nemo_like.weight_sync.digest import tensor_digest

Named = tuple[str, Tensor]

BUCKET_BYTES = 256 << 20
"""Weights that travel together; a larger tensor travels alone."""
ALIGNMENT = 16
"""Bytes: where a tensor may begin in a buffer, whatever its type."""


class Sender(Protocol):
    """The policy's half, in one of its workers."""

    @property
    def address(self) -> Any:
        """What receivers must know to meet it."""
        ...

    def meet(self) -> None:
        """Return when all receivers are there."""
        ...

    def send(self, bucket: Sequence[Named]) -> Any:
        """The parcel of a bucket; it may still be on its way.

        The parcel before it may still be read, but no earlier one.
        """
        ...

    def finish(self) -> None:
        """Return when everything has left, and give its memory back."""
        ...

    def close(self) -> None:
        """Let go of the receivers; safe to call twice."""
        ...


class Receiver(Protocol):
    """The engines' half, in one of their workers."""

    def meet(self, address: Any) -> None:
        """Return when the sender and all other receivers are there."""
        ...

    def receive(self, parcels: Sequence[Any]) -> list[Named]:
        """The bucket that the policy's workers sent, in memory of its own, each tensor checked.

        A parcel is None where a worker sent nothing.
        """
        ...

    def close(self) -> None:
        """Let go of the sender; safe to call twice."""
        ...


class Transport(Protocol):
    """A direct way for weights. It is picklable, because its halves are made where they work."""

    def sender(self, rank: int, *, host: str, num_receivers: int) -> Sender | None:
        """The half of this rank of the policy, on this machine; None if it has nothing to send."""
        ...

    def receiver(self, number: int, *, num_receivers: int) -> Receiver:
        """The half of this engine."""
        ...


@dataclass(frozen=True)
class Label:
    """What a tensor in a buffer is, and where it begins."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str
    start: int

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor, which shares the buffer's memory.

        Raises:
            CheckpointError: it is not the tensor that was sent.
        """
        num_bytes = torch.Size(self.shape).numel() * self.dtype.itemsize
        raw = buffer[self.start : self.start + num_bytes]
        tensor = raw.view(self.dtype).view(self.shape)
        if tensor_digest(tensor) != self.digest:
            raise CheckpointError(f"{self.name} was damaged on its way between two processes")
        return tensor


def buckets(tensors: Iterable[Named], max_bytes: int) -> Iterator[list[Named]]:
    """Lists of at most `max_bytes` each; a larger tensor travels alone.

    Where a bucket ends depends on sizes only, so ranks that iterate over the same tensors stay in
    step.
    """
    bucket: list[Named] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def packed_bytes(bucket: Iterable[Named]) -> int:
    """The size of the buffer that holds these tensors."""
    return sum(_room(tensor) for _, tensor in bucket)


def pack(bucket: Sequence[Named], buffer: Tensor) -> tuple[Label, ...]:
    """Lays tensors end to end in a buffer of bytes; what is where."""
    starts = accumulate((_room(tensor) for _, tensor in bucket), initial=0)
    labels = []
    for (name, tensor), start in zip(bucket, starts, strict=False):
        whole = tensor.detach().contiguous()
        buffer[start : start + whole.nbytes].copy_(whole.view(-1).view(torch.uint8))
        labels.append(Label(name, whole.dtype, tuple(whole.shape), tensor_digest(whole), start))
    return tuple(labels)


def unpack(labels: Iterable[Label], buffer: Tensor) -> list[Named]:
    """The tensors of a buffer, which share its memory.

    Raises:
        CheckpointError: one is not the tensor that was sent.
    """
    return [(label.name, label.of(buffer)) for label in labels]


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
