"""How a stored tensor is cut into the matrices that Muon orthogonalises.

Some models keep several matrices in one tensor: q, k and v, gate and up, the experts of a layer.
Which rows belong together is a property of the whole tensor, so views are applied after it has
been assembled from the ranks that hold it: the result does not depend on the layout, and a fused
model takes the same step as the same model with its matrices apart.

Source: `muon_split_qkv` is Megatron-LM's; cutting by head is the "Muon Split" of GLM-5,
https://arxiv.org/abs/2602.15763 (there for latent attention). Changed: gate and up are cut too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_like.errors import ConfigError


@dataclass(frozen=True, slots=True)
class View:
    """How the rows of a whole tensor [..., R, C] are cut into matrices.

    The rows come in `groups` equal pieces, each of them a part of `sizes[0]` rows, then one of
    `sizes[1]`, and so on. A part is taken together over all groups, in order, and then cut into
    `heads[i]` equal blocks of rows. Leading dimensions (experts) are further matrices.

    Without `sizes` all rows are one part; without `heads` no part is cut further. `transposed` says
    that the tensor is stored [in, out], and that "rows" are its columns; the matrices come out
    as [out, in] all the same, which is what a scale that looks at rows and columns wants.
    `label` is for people, and does not distinguish views.
    """

    groups: int = 1
    sizes: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    transposed: bool = False
    label: str = field(default="", compare=False)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut."""
        return not (self.sizes or self.heads or self.transposed)

    def split(self, X: Tensor) -> list[Tensor]:
        """One stack of matrices for each part; a view of `X` where its memory allows.

        Shapes: [..., R, C] -> [n, r, c] each, as `shapes` says.
        """
        if self.is_whole:
            return [X.reshape(-1, *X.shape[-2:])]
        whole = X.mT if self.transposed else X
        *lead, rows, columns = whole.shape
        sizes = self._sizes(rows)
        grouped = whole.reshape(*lead, self.groups, sum(sizes), columns)
        return [
            part.reshape(shape)
            for part, shape in zip(grouped.split(sizes, dim=-2), self.shapes(X.shape), strict=True)
        ]

    def merge(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The tensor of this shape that `split` cuts into these parts, exact to the bit.

        Shapes: [n, r, c] each -> `shape`; with `transposed` the memory is in the other order.
        """
        if self.is_whole:
            return parts[0].reshape(shape)
        *lead, rows, columns = self._as_rows(shape)
        sizes = self._sizes(rows)
        if len(parts) == 1:
            whole = parts[0].reshape(*lead, rows, columns)
        else:
            pieces = [
                part.reshape(*lead, self.groups, size, columns)
                for part, size in zip(parts, sizes, strict=True)
            ]
            whole = torch.cat(pieces, dim=-2).reshape(*lead, rows, columns)
        return whole.mT if self.transposed else whole

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """(number, rows, columns) of each stack that `split` makes of a tensor of this shape."""
        *lead, rows, columns = self._as_rows(shape)
        sizes = self._sizes(rows)
        heads = self.heads or (1,) * len(sizes)
        return [
            (math.prod(lead) * count, self.groups * size // count, columns)
            for size, count in zip(sizes, heads, strict=True)
        ]

    def part_of(self, shape: Sequence[int]) -> Tensor:
        """The number, in the order of `split`, of the matrix that each row (or column) is in.

        Shapes: (R, C) -> [R, 1], or [1, C] with `transposed`; int64.
        """
        shapes = self.shapes(shape)
        numbers = torch.arange(sum(n for n, _, _ in shapes)).split([n for n, _, _ in shapes])
        parts = [
            own.view(n, 1, 1).expand(n, rows, 1)
            for own, (n, rows, _) in zip(numbers, shapes, strict=True)
        ]
        narrow = (1, shape[1]) if self.transposed else (shape[0], 1)
        return self.merge(parts, narrow)

    def _as_rows(self, shape: Sequence[int]) -> tuple[int, ...]:
        *lead, rows, columns = shape
        return (*lead, columns, rows) if self.transposed else (*lead, rows, columns)

    def _sizes(self, rows: int) -> tuple[int, ...]:
        sizes = self.sizes or (rows // self.groups,)
        assert self.groups * sum(sizes) == rows, f"a view of other rows than {rows}: {self}"
        return sizes


WHOLE = View()


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a model's configuration says about the order of rows in its packed matrices."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: str = ""
    """transformers' `model_type`; Megatron's names explain themselves."""
    gate_up_groups: int | None = None
    """Pieces [gate; up] that `linear_fc1` comes in: one for each tensor-parallel rank whose part is
    kept together; 0 where the MLP has no gate, null where that is not known."""
    expert_gate_up_groups: int | None = None
    """The same of experts; null is `gate_up_groups`."""


def attention_shape(hf_config: Any) -> AttentionShape:
    """The shape that a Hugging Face configuration describes."""
    heads = hf_config.num_attention_heads
    return AttentionShape(
        heads,
        getattr(hf_config, "num_key_value_heads", None) or heads,
        getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        family=hf_config.model_type,
    )


PACKED_QKV = (
    "linear_qkv",
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "Wqkv",
    "wqkv",
    "W_pack",
    "qkv",
)
"""Modules whose weight holds q, k and v of softmax attention."""

STACKED_QKV = {"phi3", "phi4_multimodal", "gpt2", "mpt"}
"""Families that store [q; k; v]: all heads of q first, then those of k, then those of v."""

GROUPED_QKV = {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"}
"""Families that store [q; k; v] of one key head after the other, as Megatron's `linear_qkv`."""

LATENT_HEADS = ("q_b_proj", "kv_b_proj", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
"""Modules of latent attention whose rows are heads, of a size that is not `head_dim`."""

PACKED_GATE_UP = r"(^|\.)(gate_up_proj|shared_mlp\.input_linear)(\.weight)?$"
"""Names of [gate; up], or of [up; gate]: to be cut in halves the order is all the same."""

_EXPERTS = r"(^|\.)experts\.(gate_up_proj|down_proj)$"
STORED_IN_OUT = {
    "gpt2": r"(^|\.)(c_attn|c_proj|c_fc)\.weight$",
    "gpt_oss": _EXPERTS,
    "openai_privacy_filter": _EXPERTS,
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "aria": _EXPERTS,
    "aria_text": _EXPERTS,
}
"""Families that store some matrices [in, out], and the names of these."""

INTERLEAVED_GATE_UP = {"gpt_oss"}
"""Families that store a row of gate, a row of up, and so on."""


def view_of(
    names: Sequence[str],
    shape: Sequence[int],
    *,
    attention: AttentionShape | None = None,
    split_qkv: bool = True,
    split_gate_up: bool = True,
    split_heads: bool = False,
) -> View:
    """How the tensor of this name (or, tied, of these) and global shape is cut.

    Heads are rows of q, k and v and columns of the output projection, which stays whole. So does
    what has no name above, such as the packed inputs of state-space layers and linear attention.

    Raises:
        ConfigError: the tensor is packed in a way that is not known, or its rows are not what
            `attention` says; the message names the key that leaves it whole.
    """
    family = attention.family if attention else ""
    transposed = any(re.search(STORED_IN_OUT.get(family, "(?!)"), name) for name in names)
    tensor = _Tensor(names[0], shape[-1] if transposed else shape[-2], attention, transposed)
    module = re.sub(r"\.weight\d*$", "", names[0]).rpartition(".")[2]
    if module in PACKED_QKV and (split_qkv or split_heads):
        return tensor.qkv(of_megatron=module == "linear_qkv", by_head=split_heads)
    if split_heads and module in ("q_proj", "k_proj", "v_proj"):
        return tensor.heads(of_keys=module != "q_proj")
    if split_heads and module in LATENT_HEADS:
        raise tensor.misfit("latent attention", "heads of one known size", "muon_split_heads")
    if split_gate_up and module == "linear_fc1":
        return tensor.megatron_gate_up()
    if split_gate_up and re.search(PACKED_GATE_UP, names[0]):
        return tensor.gate_up(tensor.rows // 2 if family in INTERLEAVED_GATE_UP else 1)
    return tensor.view()


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor to be cut; `rows` are outputs, however it is stored."""

    name: str
    rows: int
    attention: AttentionShape | None
    transposed: bool

    def view(self, label: str = "", **cuts: Any) -> View:
        return View(transposed=self.transposed, label=label, **cuts)

    def qkv(self, *, of_megatron: bool, by_head: bool) -> View:
        settings = ("muon_split_qkv", "muon_split_heads") if by_head else ("muon_split_qkv",)
        a = self._attention(*settings)
        known = STACKED_QKV | GROUPED_QKV
        if not of_megatron and a.family not in known:
            raise self.misfit(
                f"q, k and v packed by a model of family {a.family!r}",
                f"one whose order of rows is known ({', '.join(sorted(known))})",
                *settings,
            )
        groups = a.num_kv_heads if of_megatron or a.family in GROUPED_QKV else 1
        expected = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        if self.rows != expected or a.num_heads % groups:
            raise self.misfit(
                f"{self.rows} rows",
                f"{expected} ({a.num_heads} heads of q, {a.num_kv_heads} of k and of v, "
                f"{a.head_dim} rows each)",
                *settings,
            )
        keys = a.num_kv_heads // groups * a.head_dim
        return self.view(
            "q, k and v apart, and their heads" if by_head else "q, k and v apart",
            groups=groups,
            sizes=(a.num_heads // groups * a.head_dim, keys, keys),
            heads=(a.num_heads, a.num_kv_heads, a.num_kv_heads) if by_head else (),
        )

    def heads(self, *, of_keys: bool) -> View:
        a = self._attention("muon_split_heads")
        heads = a.num_kv_heads if of_keys else a.num_heads
        if self.rows != heads * a.head_dim:
            raise self.misfit(
                f"{self.rows} rows", f"{heads} heads of {a.head_dim} rows", "muon_split_heads"
            )
        return self.view("heads apart", heads=(heads,))

    def gate_up(self, groups: int) -> View:
        if self.rows % (2 * groups):
            raise self.misfit(
                f"{self.rows} rows",
                f"as many rows of gate as of up, in {groups} piece(s)",
                "muon_split_gate_up",
            )
        half = self.rows // groups // 2
        return self.view("gate and up apart", groups=groups, sizes=(half, half))

    def megatron_gate_up(self) -> View:
        groups = self.attention.gate_up_groups if self.attention else None
        if self.attention and ".experts." in self.name:
            own = self.attention.expert_gate_up_groups
            groups = groups if own is None else own
        if groups is None:
            raise self.misfit(
                "a matrix that may hold gate and up",
                "to be told whether the MLP has a gate (gate_up_groups)",
                "muon_split_gate_up",
            )
        return self.gate_up(groups) if groups else self.view()

    def misfit(self, found: str, expected: str, *settings: str) -> ConfigError:
        off = " and ".join(f"policy.optimizer.{setting}=false" for setting in settings)
        return ConfigError(
            f"{self.name}: found {found}, expected {expected}; set {off} to orthogonalise it as "
            "one matrix"
        )

    def _attention(self, *settings: str) -> AttentionShape:
        if self.attention is None:
            raise self.misfit("a model without a known attention shape", "its heads", *settings)
        return self.attention
