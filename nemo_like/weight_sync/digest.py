"""What a set of weights is, in 32 characters: equal digests, equal weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor


def tensor_digest(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's type, shape and bytes, on whatever device it is."""
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digest(digest_of_name: Mapping[str, str]) -> str:
    """xxh3-128 of named tensors, in whatever order they came."""
    lines = (f"{name} {digest}\n" for name, digest in sorted(digest_of_name.items()))
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())
