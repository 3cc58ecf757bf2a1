"""What the optimizer is told of megatron-core's parameters: their names, and what is packed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from nemo_like.backends.megatron.convert import WeightTable
from nemo_like.config.megatron import MegatronConfig
from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.errors import ConfigError
from nemo_like.optim.views import AttentionShape, attention_shape


def all_names(
    table: WeightTable, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Parameters by their own names, and by those of what they are made of."""
    for name, weight in weights:
        for known in (name, *table.hf_names(name)):
            yield known, weight


def packed_attention(
    hf_config: Any, config: MegatronConfig, *, blockwise: bool = False
) -> AttentionShape:
    """The order of rows in packed matrices: in whole ones, or in the blocks of one rank."""
    shape = attention_shape(hf_config)
    tp = config.tensor_model_parallel_size
    return replace(
        shape,
        num_heads=shape.num_heads // tp if blockwise else shape.num_heads,
        num_kv_heads=shape.num_kv_heads // tp if blockwise else shape.num_kv_heads,
        gate_up_groups=1 if blockwise else tp,
        expert_gate_up_groups=1 if blockwise else config.expert_tensor_parallel_size,
    )


def of_rank(config: OptimizerConfig, table: WeightTable, own: Iterable[str]) -> OptimizerConfig:
    """The settings without the patterns that parameters of other ranks alone match."""
    here = [known for name in own for known in (name, *table.hf_names(name))]
    every = [known for name in table.entries for known in (name, *table.hf_names(name))]

    def kept(patterns: Sequence[str]) -> tuple[str, ...]:
        def found(pattern: str, names: Sequence[str]) -> bool:
            return any(re.search(pattern, name) for name in names)

        # One that nothing matches on any rank is for the optimizer to refuse.
        return tuple(p for p in patterns if found(p, here) or not found(p, every))

    patterns = {name: kept(getattr(config, name)) for name in ("muon_include", "muon_exclude")}
    return config.model_copy(update=patterns)


def refuse_halves(table: WeightTable, patterns: Sequence[str]) -> None:
    """Refuse a pattern that names a part of what megatron-core keeps in one matrix."""
    for name in table.entries:
        parts = table.hf_names(name)
        for pattern in patterns:
            found = [part for part in parts if re.search(pattern, part)]
            if found and len(found) < len(parts) and not re.search(pattern, name):
                rest = ", ".join(part for part in parts if part not in found)
                raise ConfigError(
                    f"muon_include and muon_exclude: {pattern!r} matches {found[0]}, which the "
                    f"Megatron backend keeps in one matrix with {rest}; name all of them or none"
                )
