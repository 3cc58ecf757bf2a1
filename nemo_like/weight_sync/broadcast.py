"""Weights by a collective from rank 0 of the policy to all engines: NCCL on GPUs, gloo on CPUs.

The group belongs to nobody else: it is made without `init_process_group`, so neither the policy's
own groups nor those of vLLM know of it. What a bucket holds is told by call, and the bytes follow
by broadcast. A member that dies breaks the group: everyone else gets an error, and a new group is
made for the next sync.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_like.errors import WorkerError
from nemo_like.weight_sync.transport import Label, Named, pack, packed_bytes, unpack

GRACE_S = 1.0
"""Gloo ends a late broadcast itself, after the deadline; NCCL's is ended this much later."""
POLL_S = 0.0005
"""How often an unfinished broadcast is looked at: waiting for NCCL's would not end with a peer."""


@dataclass(frozen=True)
class Announcement:
    """What a broadcast carries."""

    num_bytes: int
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Broadcast:
    """The transport between processes on GPUs of their own, or anywhere on CPUs.

    Args:
        deadline_s: How long members wait for each other, and for one bucket.
    """

    deadline_s: float = 60.0

    def sender(self, rank: int, *, host: str, num_receivers: int) -> BroadcastSender | None:
        """Rank 0's half."""
        if rank > 0:
            return None
        return BroadcastSender(host, 1 + num_receivers, self.deadline_s)

    def receiver(self, number: int, *, num_receivers: int) -> BroadcastReceiver:
        """An engine's half."""
        return BroadcastReceiver(1 + number, 1 + num_receivers, self.deadline_s)


class BroadcastSender:
    """Member 0 of the group; sends from two half buffers, so that one fills while one leaves."""

    def __init__(self, host: str, size: int, deadline_s: float) -> None:
        self._size, self._deadline_s = size, deadline_s
        self._store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=_seconds(deadline_s)
        )
        self.address = (host, self._store.port)
        self._group: _Group | None = None
        self._halves: list[tuple[Tensor, Any] | None] = [None, None]
        self._turn = 0

    def meet(self) -> None:
        """Returns when all receivers have joined."""
        if self._group is None:
            self._group = _Group(self._store, 0, self._size, self._deadline_s)

    def send(self, bucket: Sequence[Named]) -> Announcement:
        """Begins to broadcast a bucket; the parcel says what it holds."""
        assert self._group is not None, "send before meet"
        self._turn = 1 - self._turn
        size = packed_bytes(bucket)
        buffer = self._free_half(size)
        labels = pack(bucket, buffer)
        self._halves[self._turn] = (buffer, self._group.begin(buffer[:size]))
        return Announcement(size, labels)

    def finish(self) -> None:
        """Returns when all buckets have left, and gives the buffers back."""
        for half in self._halves:
            if half is not None and self._group is not None:
                self._group.end(half[1])
        self._halves = [None, None]

    def close(self) -> None:
        """Breaks the group, and what is still on its way."""
        self._halves = [None, None]
        if self._group is not None:
            self._group.abort()
            self._group = None

    def _free_half(self, size: int) -> Tensor:
        half = self._halves[self._turn]
        if half is not None and self._group is not None:
            self._group.end(half[1])
            if half[0].numel() >= size:
                return half[0]
        return torch.empty(size, dtype=torch.uint8, device=_device())


class BroadcastReceiver:
    """Another member of the group."""

    def __init__(self, rank: int, size: int, deadline_s: float) -> None:
        self._rank, self._size, self._deadline_s = rank, size, deadline_s
        self._group: _Group | None = None

    def meet(self, address: tuple[str, int]) -> None:
        """Returns when all members have joined."""
        host, port = address
        store = dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=_seconds(self._deadline_s)
        )
        self._group = _Group(store, self._rank, self._size, self._deadline_s)

    def receive(self, parcels: Sequence[Announcement | None]) -> list[Named]:
        """The bucket that this announces."""
        assert self._group is not None, "receive before meet"
        (announced,) = [parcel for parcel in parcels if parcel is not None]
        buffer = torch.empty(announced.num_bytes, dtype=torch.uint8, device=_device())
        self._group.end(self._group.begin(buffer))
        return unpack(announced.labels, buffer)

    def close(self) -> None:
        """Breaks the group."""
        if self._group is not None:
            self._group.abort()
            self._group = None


class _Group:
    """A process group of its own, and broadcasts from its member 0."""

    def __init__(self, store: dist.Store, rank: int, size: int, deadline_s: float) -> None:
        self._store, self._deadline_s = store, deadline_s
        backend: Any
        if torch.cuda.is_available():
            options = dist.ProcessGroupNCCL.Options()
            # Torch ends the process of a broadcast that is later than this: ours ends before.
            options._timeout = _seconds(10 * deadline_s)
            backend = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            backend = dist.ProcessGroupGloo(store, rank, size, _seconds(deadline_s))
        self._backend = backend
        # NCCL connects at the first collective: let that be while all are waiting for it.
        self.end(self.begin(torch.zeros(1, dtype=torch.uint8, device=_device())))

    def begin(self, buffer: Tensor) -> Any:
        """A broadcast that has begun."""
        if self._backend is None:
            raise WorkerError("policy.generation.refit_transport=broadcast: the group broke before")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return self._backend.broadcast([buffer], options)

    def end(self, work: Any) -> None:
        """Returns when a broadcast is over.

        Raises:
            WorkerError: another member is gone, or late; the group is broken for good.
        """
        deadline = time.monotonic() + self._deadline_s + GRACE_S
        try:
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no end of a broadcast within {self._deadline_s:g} s")
                time.sleep(POLL_S)
            work.wait()
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
        except (RuntimeError, TimeoutError) as error:
            self.abort()
            raise WorkerError(
                f"policy.generation.refit_transport=broadcast: the group broke ({error})"
            ) from error

    def abort(self) -> None:
        """Lets go of the others, whatever they do. To go on with a broken group would crash."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.abort()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _seconds(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)
