"""Weights in memory that policy and engine share: of their GPU, or of their machine.

The sender has two half buffers: while the engines copy out of one, it fills the other. A receiver
copies, because vLLM holds on to tensors until it has all of a layer.

Source: CUDA's handles for memory of another process, as `torch.multiprocessing.reductions` makes
and opens them. A worker opens what lies on a GPU that it sees: hence one sender on each GPU, and
parcels by GPU. On a CPU it is a file in memory, which the kernel frees with the processes that hold
it; another process opens it through /proc.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from nemo_like.errors import WorkerError
from nemo_like.weight_sync.transport import Label, Named, pack, packed_bytes, unpack

ARGUMENT_DEVICE = 6
"""The place of the device's index among the arguments of `rebuild_cuda_tensor`."""


@dataclass(frozen=True)
class SharedParcel:
    """Where a bucket lies: the handle of a buffer, on a device with this name."""

    device: str
    handle: Any
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Ipc:
    """The transport between processes that share a GPU, or the memory of one machine."""

    def sender(self, rank: int, *, host: str, num_receivers: int) -> IpcSender | None:
        """On GPUs every rank sends, to the engine beside it; on a CPU one rank does, to all."""
        on_gpu = torch.cuda.is_available()
        return IpcSender() if on_gpu or rank == 0 else None

    def receiver(self, number: int, *, num_receivers: int) -> IpcReceiver:
        """An engine's half."""
        return IpcReceiver()


class IpcSender:
    """Two half buffers, filled in turn."""

    address = None

    def __init__(self) -> None:
        self._halves: list[_CpuBuffer | _GpuBuffer | None] = [None, None]
        self._turn = 0

    def meet(self) -> None:
        """Nobody needs to be there."""

    def send(self, bucket: Sequence[Named]) -> SharedParcel:
        """The parcel that says where the bucket lies, until the next but one."""
        self._turn = 1 - self._turn
        size = packed_bytes(bucket)
        half = self._halves[self._turn]
        if half is None or half.bytes.numel() < size:
            half = _GpuBuffer(size) if torch.cuda.is_available() else _CpuBuffer(size)
            self._halves[self._turn] = half
        labels = pack(bucket, half.bytes)
        return SharedParcel(device_name(), half.handle(), labels)

    def finish(self) -> None:
        """Gives the buffers back: until the next sync their memory is for training."""
        self._halves = [None, None]
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()

    def close(self) -> None:
        """The same."""
        self.finish()


class IpcReceiver:
    """Copies out of the buffer on its own device."""

    def meet(self, address: None) -> None:
        """Nobody needs to be there."""

    def receive(self, parcels: Sequence[SharedParcel | None]) -> list[Named]:
        """The bucket that lies on this device.

        Raises:
            WorkerError: none lies here, or the sender's memory can not be opened.
        """
        own = device_name()
        here = [parcel for parcel in parcels if parcel is not None and parcel.device == own]
        if not here:
            found = ", ".join(sorted({parcel.device for parcel in parcels if parcel is not None}))
            raise WorkerError(
                f"policy.generation.refit_transport=ipc: this engine is on {own}, and the policy's "
                f"weights are on {found}, which is not shared. Set object_store"
            )
        return unpack(here[0].labels, _copied(here[0].handle))

    def close(self) -> None:
        """Nothing stays open after a parcel."""


@dataclass
class _CpuBuffer:
    """Bytes in a file that is nowhere but in memory."""

    size: int
    bytes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("nemo_like_weights"), "r+b")
        self._file.truncate(max(self.size, 1))
        self.bytes = _mapped(self._file.fileno(), self.size)

    def handle(self) -> tuple[int, int, int]:
        """Process, file and size: what another process opens it by."""
        return os.getpid(), self._file.fileno(), self.size


class _GpuBuffer:
    """Bytes on this process's GPU."""

    def __init__(self, size: int) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device="cuda")

    def handle(self) -> tuple[Any, ...]:
        """The arguments that rebuild it; one receiver opens each, as torch's counting demands."""
        torch.cuda.synchronize()  # another process's stream does not wait for ours
        arguments: tuple[Any, ...] = reduce_tensor(self.bytes)[1]
        return arguments


def device_name() -> str:
    """What tells this process's device from others; another process on it finds the same."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"GPU {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _copied(handle: Any) -> Tensor:
    if torch.cuda.is_available():
        arguments = list(handle)
        arguments[ARGUMENT_DEVICE] = torch.cuda.current_device()
        copy: Tensor = rebuild_cuda_tensor(*arguments).clone()
        torch.cuda.synchronize()  # the sender may write to its half again after this
        return copy
    process, file, size = handle
    try:
        opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
    except OSError as error:
        raise WorkerError(
            f"policy.generation.refit_transport=ipc: this engine can not open the policy's memory "
            f"({error}): are they on one machine, and in one container? Set object_store"
        ) from error
    try:
        return _mapped(opened, size).clone()
    finally:
        os.close(opened)


def _mapped(file: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, max(size, 1)), dtype=torch.uint8)[:size]
