"""Which rows of which Hugging Face tensors megatron-core's parameters are made of: a pure table.

megatron-core packs q, k and v into one matrix, and gate and up into another. Parameters are named
globally here: the numbers of layers and experts count over all pipeline and expert ranks.
Hugging Face names are those of checkpoints on the hub, with one tensor per expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_like.backends.hf_models import hub_shapes
from nemo_like.config.megatron import MegatronConfig
from nemo_like.errors import ConfigError
from nemo_like.optim.layout import Shape
from nemo_like.optim.views import AttentionShape, attention_shape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_TP_SIZE = "policy.megatron_cfg.tensor_model_parallel_size"
_EXPERT_TP_SIZE = "policy.megatron_cfg.expert_tensor_parallel_size"


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows of a Hugging Face tensor, from row `first` on."""

    hf_name: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One whole parameter: what its rows are, in order, and how tensor parallelism cuts it.

    Rows that `rows` leaves over at the end are padding of the vocabulary, always zero. `tp_dim` is
    cut evenly over the ranks; None is a copy on each. `is_expert` says that these are the ranks of
    expert tensor parallelism.
    """

    shape: Shape
    tp_dim: int | None
    is_expert: bool
    rows: tuple[Rows, ...]

    @property
    def has_blocks(self) -> bool:
        """Whether it is a matrix of which every tensor-parallel rank has a block of its own."""
        return len(self.shape) == 2 and self.tp_dim is not None


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a Hugging Face tensor that is the rows of a local block from `start` on."""

    hf_name: str
    offset: Shape
    shape: Shape
    start: int


class WeightTable:
    """The parameters of a model under some tensor parallelism, and the Hugging Face tensors.

    The size of tensor parallelism matters for more than the cut: each rank keeps its part of gate
    and its part of up together, so it decides the order of rows in the whole `linear_fc1`.
    """

    def __init__(self, hf_config: Any, *, tp_size: int = 1, expert_tp_size: int = 1) -> None:
        _refuse_biases(hf_config)
        self.tied = bool(hf_config.tie_word_embeddings)
        self.hf_shapes = hub_shapes(hf_config)
        self._tp_sizes = {False: tp_size, True: expert_tp_size}
        self.entries = dict(self._entries(hf_config))
        for name, entry in self.entries.items():
            self._refuse_uneven(name, entry)

    @classmethod
    def of(cls, config: MegatronConfig, hf_config: Any) -> WeightTable:
        """The table of a model in this layout."""
        return cls(
            hf_config,
            tp_size=config.tensor_model_parallel_size,
            expert_tp_size=config.expert_tensor_parallel_size,
        )

    def local_box(self, name: str, tp_rank: int) -> tuple[Shape, Shape]:
        """Offset and shape of a tensor-parallel rank's part of a whole parameter.

        `tp_rank` counts the ranks of expert tensor parallelism where the entry is an expert's.
        """
        entry = self.entries[name]
        offset, shape = [0] * len(entry.shape), list(entry.shape)
        if entry.tp_dim is not None:
            shape[entry.tp_dim] //= self._tp_sizes[entry.is_expert]
            offset[entry.tp_dim] = tp_rank * shape[entry.tp_dim]
        return tuple(offset), tuple(shape)

    def hf_names(self, name: str) -> tuple[str, ...]:
        """The Hugging Face tensors that a parameter is made of."""
        return tuple(dict.fromkeys(rows.hf_name for rows in self.entries[name].rows))

    def pieces(self, name: str, offset: Shape, shape: Shape) -> list[Piece]:
        """What a block of a whole parameter is made of, in order; padding is left out."""
        found: list[Piece] = []
        row = 0
        for rows in self.entries[name].rows:
            begin = max(row, offset[0])
            count = min(row + rows.count, offset[0] + shape[0]) - begin
            box: Shape = (count, *shape[1:])
            if count > 0 and 0 not in box:
                hf_offset = (rows.first + begin - row, *offset[1:])
                found.append(Piece(rows.hf_name, hf_offset, box, begin - offset[0]))
            row += rows.count
        return found

    def _entries(self, hf_config: Any) -> Iterator[tuple[str, Entry]]:
        yield "embedding.word_embeddings.weight", self._vocabulary(EMBEDDING)
        for layer in range(hf_config.num_hidden_layers):
            yield from self._layer(f"decoder.layers.{layer}.", f"model.layers.{layer}.", hf_config)
        yield "decoder.final_layernorm.weight", self._copy("model.norm.weight")
        # Of tied weights the last pipeline stage has a copy under this name.
        yield "output_layer.weight", self._vocabulary(EMBEDDING if self.tied else HEAD)

    def _layer(self, own: str, hf: str, hf_config: Any) -> Iterator[tuple[str, Entry]]:
        heads = attention_shape(hf_config)
        yield f"{own}input_layernorm.weight", self._copy(f"{hf}input_layernorm.weight")
        for kind in ("weight", "bias"):
            if f"{hf}self_attn.q_proj.{kind}" in self.hf_shapes:
                yield f"{own}self_attention.linear_qkv.{kind}", self._qkv(hf, kind, heads)
        yield (
            f"{own}self_attention.linear_proj.weight",
            self._copy(f"{hf}self_attn.o_proj.weight", tp_dim=1),
        )
        for part in ("q", "k"):
            if f"{hf}self_attn.{part}_norm.weight" in self.hf_shapes:
                norm = self._copy(f"{hf}self_attn.{part}_norm.weight")
                yield f"{own}self_attention.{part}_layernorm.weight", norm
        norm = self._copy(f"{hf}post_attention_layernorm.weight")
        yield f"{own}pre_mlp_layernorm.weight", norm
        if f"{hf}mlp.gate.weight" not in self.hf_shapes:
            yield from self._mlp(f"{own}mlp.", f"{hf}mlp.", is_expert=False)
            return
        yield f"{own}mlp.router.weight", self._copy(f"{hf}mlp.gate.weight")
        for expert in range(hf_config.num_experts):
            yield from self._mlp(
                f"{own}mlp.experts.local_experts.{expert}.",
                f"{hf}mlp.experts.{expert}.",
                is_expert=True,
            )

    def _mlp(self, own: str, hf: str, *, is_expert: bool) -> Iterator[tuple[str, Entry]]:
        gate, up = f"{hf}gate_proj.weight", f"{hf}up_proj.weight"
        rows, columns = self.hf_shapes[gate]
        parts = self._tp_sizes[is_expert]
        count = rows // parts
        order = tuple(Rows(name, i * count, count) for i in range(parts) for name in (gate, up))
        yield f"{own}linear_fc1.weight", Entry((2 * rows, columns), 0, is_expert, order)
        down = self._copy(f"{hf}down_proj.weight", tp_dim=1, is_expert=is_expert)
        yield f"{own}linear_fc2.weight", down

    def _qkv(self, hf: str, kind: str, heads: AttentionShape) -> Entry:
        """For each head of keys: the heads of queries that share it, its keys, its values."""
        sizes = {"q": heads.num_heads // heads.num_kv_heads * heads.head_dim}
        sizes |= dict.fromkeys("kv", heads.head_dim)
        rows = tuple(
            Rows(f"{hf}self_attn.{part}_proj.{kind}", group * size, size)
            for group in range(heads.num_kv_heads)
            for part, size in sizes.items()
        )
        columns = self.hf_shapes[rows[0].hf_name][1:]
        return Entry((sum(part.count for part in rows), *columns), 0, False, rows)

    def _copy(self, hf_name: str, *, tp_dim: int | None = None, is_expert: bool = False) -> Entry:
        shape = self.hf_shapes[hf_name]
        return Entry(shape, tp_dim, is_expert, (Rows(hf_name, 0, shape[0]),))

    def _vocabulary(self, hf_name: str) -> Entry:
        rows, columns = self.hf_shapes[hf_name]
        shape = (padded_vocab_size(rows, tp_size=self._tp_sizes[False]), columns)
        return Entry(shape, 0, False, (Rows(hf_name, 0, rows),))

    def _refuse_uneven(self, name: str, entry: Entry) -> None:
        if entry.tp_dim is None:
            return
        parts = self._tp_sizes[entry.is_expert]
        # A rank's rows of `linear_fc1` are two equal halves.
        unit = 2 * parts if name.endswith("linear_fc1.weight") else parts
        length = entry.shape[entry.tp_dim]
        if length % unit:
            key = _EXPERT_TP_SIZE if entry.is_expert else _TP_SIZE
            raise ConfigError(
                f"{key}={parts}: {name} has {length} {('rows', 'columns')[entry.tp_dim]}, expected "
                f"a multiple of {unit}; choose a size that divides them"
            )


def padded_vocab_size(vocab_size: int, *, tp_size: int) -> int:
    """Rows of the embedding and the head: as many as there are tokens, and even over the ranks."""
    return math.ceil(vocab_size / tp_size) * tp_size


def has_experts(hf_config: Any, layer: int) -> bool:
    """Whether the MLP of this layer is a mixture of experts."""
    return (
        hf_config.model_type == "qwen3_moe"
        and hf_config.num_experts > 0
        and layer not in hf_config.mlp_only_layers
        and (layer + 1) % hf_config.decoder_sparse_step == 0
    )


def _refuse_biases(hf_config: Any) -> None:
    # megatron-core has one switch for these and for the biases of all other matrices.
    fields = hf_config.to_dict()
    for field in ("attention_bias", "mlp_bias"):
        if fields.get(field):
            raise ConfigError(
                f"policy.model_name: the model's config.json says {field}=true, which the Megatron "
                "backend does not support, expected false; use policy.dtensor_cfg.enabled=true"
            )
