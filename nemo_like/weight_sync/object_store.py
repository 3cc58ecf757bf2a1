"""Weights in the parcels themselves, which lie in Ray's object store: on every kind of machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_like.weight_sync.transport import Label, Named, pack, packed_bytes, unpack


@dataclass(frozen=True)
class StoredParcel:
    """A bucket as plain bytes, in the memory of this machine."""

    labels: tuple[Label, ...]
    raw: np.ndarray


class StoreSender:
    """Copies weights into memory of the host."""

    def send(self, bucket: Sequence[Named]) -> StoredParcel:
        """The parcel with the bucket in it."""
        buffer = torch.empty(packed_bytes(bucket), dtype=torch.uint8)
        return StoredParcel(pack(bucket, buffer), buffer.numpy())

    def finish(self) -> None:
        """Parcels have left when they are returned."""


class StoreReceiver:
    """Copies weights out of the store, of which all engines of a machine read one copy."""

    def receive(self, parcels: Sequence[StoredParcel | None]) -> list[Named]:
        """The bucket; to write to the object store's memory would crash, hence a copy."""
        (parcel,) = [parcel for parcel in parcels if parcel is not None]
        return unpack(parcel.labels, torch.from_numpy(parcel.raw.copy()))
