"""Weights on their way between processes, in bounded chunks of plain bytes with digests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_like.errors import CheckpointError
from nemo_like.weight_sync.digest import tensor_digest

Named = tuple[str, Tensor]


@dataclass(frozen=True)
class WireTensor:
    """One tensor as plain bytes (numpy knows no bfloat16)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    raw: np.ndarray
    digest: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> WireTensor:
        """The bytes of a tensor on any device."""
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return cls(name, tensor.dtype, tuple(tensor.shape), raw, tensor_digest(tensor))

    def tensor(self) -> Tensor:
        """A tensor with memory of its own: to write to the object store's would crash.

        Raises:
            CheckpointError: it is not the tensor that was sent.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = self.raw
        if tensor_digest(tensor) != self.digest:
            raise CheckpointError(f"{self.name} was damaged on its way between two processes")
        return tensor


Chunk = list[WireTensor]


def chunked(tensors: Iterable[Named], max_bytes: int) -> Iterator[list[Named]]:
    """Lists of at most `max_bytes` each; a larger tensor travels alone.

    Where a chunk ends depends on sizes only, so ranks that iterate over the same tensors stay in
    step.
    """
    chunk: list[Named] = []
    size = 0
    for name, tensor in tensors:
        if chunk and size + tensor.nbytes > max_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    if chunk:
        yield chunk


def to_wire(tensors: Iterable[Named]) -> Chunk:
    """These tensors in the form that travels."""
    return [WireTensor.of(name, tensor) for name, tensor in tensors]


def from_wire(chunk: Chunk) -> list[Named]:
    """The inverse of `to_wire`, on the CPU."""
    return [(item.name, item.tensor()) for item in chunk]
