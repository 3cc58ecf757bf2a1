"""Sequences laid end to end: from a value per sequence to one per token, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(values_B: Tensor, lengths_B: Tensor, num_tokens: int) -> Tensor:
    """Each sequence's value at each of its tokens. Shapes: [N], N = `num_tokens`.

    `num_tokens` is the sum of the lengths, given so that a GPU need not be waited for.
    """
    return values_B.repeat_interleave(lengths_B, output_size=num_tokens)


@torch.no_grad()
def sums(values_N: Tensor, lengths_B: Tensor) -> Tensor:
    """The sum of each sequence's tokens in fp64, without gradient. Shapes: [B].

    One sequence is added up in its own order, so the sum does not depend on its company (atomic
    additions on a GPU would come in another order every time).
    """
    return torch.segment_reduce(values_N.double(), "sum", lengths=lengths_B, unsafe=True)


def means(values_N: Tensor, mask_N: Tensor, lengths_B: Tensor) -> Tensor:
    """The mean over each sequence's tokens in the mask, in fp64; 0 without any. Shapes: [B]."""
    totals_B = sums(torch.where(mask_N, values_N, 0.0), lengths_B)
    return totals_B / sums(mask_N, lengths_B).clamp(min=1.0)
