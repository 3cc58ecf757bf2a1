"""Experts as checkpoints have them, apart, and as transformers hold them, in one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


def apart(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights with a tensor for each expert, under its name on the hub.

    They are views of what was given, which may be on `meta`.
    """
    for name, weight in named:
        layer, _, kind = name.partition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            yield name, weight
            continue
        for number, expert in enumerate(weight):
            matrices = {kind: expert}
            if kind == "gate_up_proj":
                matrices = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            for matrix, rows in matrices.items():
                yield f"{layer}.experts.{number}.{matrix}.weight", rows
