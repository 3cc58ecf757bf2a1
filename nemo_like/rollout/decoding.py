"""What lets a Hugging Face model decode without copying its KV cache at every token.

The cache holds, and attention reads, what those of `transformers` do, with fewer passes over
memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "nemo_like_grouped"
"""The name by which `transformers` knows `grouped_attention`."""


class GrowingLayer(DynamicLayer):
    """The cache of one layer, as views of buffers with spare room.

    New tokens are written behind the others, which are copied only when the room is used up.
    """

    keys: Tensor
    values: Tensor
    _buffers: list[Tensor]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing comes back; the cache is then empty, and has no room yet."""
        super().lazy_initialization(key_states, value_states)
        self._buffers = [new[:, :, :0] for new in (key_states, value_states)]
        self._show(0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last. Shapes: [B, heads, T, width] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        for i, new in enumerate((key_states, value_states)):
            if end > self._buffers[i].shape[2]:
                self._buffers[i] = _with_room(self._buffers[i][:, :, :start], end)
            self._buffers[i][:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Nothing comes back; the cache is then of these sequences, some perhaps several times."""
        length = self.keys.shape[2]
        self._buffers = [buffer.index_select(0, indices) for buffer in self._buffers]
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _with_room(held: Tensor, needed: int) -> Tensor:
    """A copy with room for `needed` tokens and some more: copies stay rare, and waste small."""
    batch, heads, length, width = held.shape
    buffer = held.new_empty(batch, heads, needed + needed // 8 + 64, width)
    buffer[:, :, :length] = held
    return buffer


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of this configuration; sliding windows keep their own layers."""
    cache = DynamicCache(config=config)
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token per sequence; of several, it is that of `transformers`.

    Query heads that share a key head are taken for tokens of one head, so keys and values need not
    be repeated for each of them.

    Shapes: query [B, heads, T, width], result [B, T, heads, width].
    """
    if query.shape[2] != 1 or options.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    batch, heads, _, width = query.shape
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], -1, width), key, value, attention_mask, scale=scaling
    )
    return attended.reshape(batch, 1, heads, -1), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
