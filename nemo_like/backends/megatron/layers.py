"""The layers of a decoder on plain PyTorch: norms, attention, and rotary positions.

megatron-core's own layers without TransformerEngine refuse sequence parallelism, context
parallelism and packed rows. These do all three, on GPUs and CPUs, and are used also where
TransformerEngine is installed: one set of parameter names and one arithmetic everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, CausalVariant

from nemo_like.backends.megatron.rows import LocalRows, Piece

if not moe_utils.HAVE_TE:
    # megatron-core 0.16.1 asks at moe_utils.py:1192 for a name that it then never defined.
    moe_utils.te_general_gemm = None


class RMSNorm(nn.RMSNorm):
    """The norm whose weight says that each tensor-parallel rank has a part of its gradient."""

    weight: Any  # megatron-core keeps notes on parameters, of which torch's types know nothing

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class CausalAttention(nn.Module):
    """Causal attention that stays inside each sequence of a row.

    Under context parallelism a rank has queries of two chunks of a row (see `LocalRows`), and
    gathers the keys and values of all; their gradients are summed on the way back.
    """

    def __init__(self, config: Any, *, softmax_scale: Any, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.group = pg_collection.cp

    def forward(
        self,
        query_TRHC: Tensor,
        key_TRGC: Tensor,
        value_TRGC: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: LocalRows,
        **_: Any,
    ) -> Tensor:
        """What each query sees, its heads side by side. Shapes: [T, R, H * C]."""
        if self.group.size() > 1:
            both = gather_from_sequence_parallel_region(
                torch.cat((key_TRGC, value_TRGC), -1), group=self.group
            )
            both = _in_order(both, self.group.size())
            key_TRGC, value_TRGC = both.split(query_TRHC.shape[-1], -1)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_TRHC, key_TRGC, value_TRGC))
        rows = [
            torch.cat(
                [self._attend(query[rows], key[rows], value[rows], piece) for piece in pieces], 2
            )
            for rows, pieces in packed_seq_params.pieces
        ]
        return torch.cat(rows).permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, piece: Piece) -> Tensor:
        mask = _causal(_length(piece.queries), _length(piece.keys))
        return F.scaled_dot_product_attention(
            query[:, :, piece.queries],
            key[:, :, piece.keys],
            value[:, :, piece.keys],
            attn_mask=mask,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def _causal(num_queries: int, num_keys: int) -> CausalBias:
    """What `causal_lower_right` gives, which would also allocate 8 x queries x keys bytes.

    It hands its numbers to the constructor of a tensor, which takes them for sizes.
    """
    bias = torch.Tensor._make_subclass(CausalBias, torch.empty(0))
    CausalBias.__init__(bias, CausalVariant.LOWER_RIGHT, num_queries, num_keys)
    return bias


def _length(part: slice) -> int:
    return part.stop - part.start


def _in_order(gathered: Tensor, num_ranks: int) -> Tensor:
    """Rank r's chunks r and 2n - 1 - r, rank after rank, brought into the order of the row."""
    chunks = gathered.chunk(2 * num_ranks)
    return torch.cat((*chunks[::2], *reversed(chunks[1::2])))


class RotaryPositions(nn.Module):
    """Angles for any positions, with a Hugging Face model's own frequencies."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(inverse_frequencies, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Shapes: positions [T, R]; the result [T, R, 1, C], fp32, in radians."""
        angles = positions[:, :, None, None] * self.frequencies.float()
        return torch.cat((angles, angles), -1)


def decoder_spec(config: Any, moe_layers: Sequence[bool]) -> TransformerBlockSubmodules:
    """What a stage's layers are made of; one entry of `moe_layers` for each of them."""

    def layer(is_moe: bool) -> ModuleSpec:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts if is_moe else None,
            qk_layernorm=config.qk_layernorm,
            normalization="RMSNorm",
        )
        parts = spec.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention = parts.self_attention.submodules
        attention.core_attention = CausalAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        return spec

    return TransformerBlockSubmodules([layer(is_moe) for is_moe in moe_layers], RMSNorm)
