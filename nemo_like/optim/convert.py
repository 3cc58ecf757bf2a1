"""State of an optimizer under other owners: what a new algorithm can use of what an old one saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_like.errors import CheckpointError
from nemo_like.optim.combined import STATE_TENSORS

INHERITED = {("adamw", "muon"): {"exp_avg": "momentum_buffer"}}
"""(old, new) algorithm: which tensor becomes which; between others everything starts anew.

AdamW's `exp_avg` before its bias correction is what Muon's momentum is: an average of gradients
that began at zero, only over fewer steps (`adam_beta1`). Nothing goes the other way: a second
moment can not be had from a momentum, and a first moment with a new step count would be divided by
1 - beta1, so that the first steps would be too long by up to that. The buffer of SGD is no average
but a sum, over a decay of its own.
"""

Tree = dict[str, Any]
"""What `CombinedOptimizer.state_tree` gives."""


def template_for(own: Tree, saved_owners: Mapping[str, str], owners: Mapping[str, str]) -> Tree:
    """A tree as the owners of a checkpoint have it, in this run's layout, to be loaded into.

    Tensors that are kept are the live ones of `own`, so that they are filled in place.

    Raises:
        CheckpointError: the checkpoint has other parameters.
    """
    if other := sorted(saved_owners.keys() ^ owners.keys()):
        raise CheckpointError(
            f"the optimizer state is of other parameters: {', '.join(other[:5])} "
            f"{'is' if len(other) == 1 else 'are'} only in the checkpoint or only in this run"
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, mine in own["state"].items():
        like = next(iter(mine.values()))
        kept = kept_tensors(saved_owners[name], owners[name])
        tensors[name] = {
            key: mine[kept[key]] if key in kept else torch.zeros_like(like)
            for key in STATE_TENSORS[saved_owners[name]]
        }
    steps = {name: 0 for name in own["state"] if saved_owners[name] == "adamw"}
    return {"state": tensors, "steps": steps}


def convert(
    loaded: Tree, own: Tree, saved_owners: Mapping[str, str], owners: Mapping[str, str]
) -> Tree:
    """The tree of this run's owners, from one of `template_for`'s form; the rest is zero."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, mine in own["state"].items():
        kept = kept_tensors(saved_owners[name], owners[name])
        old_key = {new: old for old, new in kept.items()}
        tensors[name] = {
            key: loaded["state"][name][old_key[key]] if key in old_key else torch.zeros_like(tensor)
            for key, tensor in mine.items()
        }
    kept_steps = {n: s for n, s in loaded["steps"].items() if owners[n] == saved_owners[n]}
    return {"state": tensors, "steps": {name: kept_steps.get(name, 0) for name in own["steps"]}}


def kept_tensors(old: str, new: str) -> Mapping[str, str]:
    """Which tensor of the old algorithm becomes which of the new one."""
    if old == new:
        return {key: key for key in STATE_TENSORS[old]}
    return INHERITED.get((old, new), {})


def describe(saved_owners: Mapping[str, str], owners: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Rows (optimizer, first of them, tensors, kept, starts anew); none where no owner changed."""
    if saved_owners == owners:
        return []
    members: dict[tuple[str, str], list[str]] = {}
    for name, new in owners.items():
        members.setdefault((saved_owners[name], new), []).append(name)
    return [
        (old if old == new else f"{old} to {new}", names[0], f"{len(names):,}", *_fate(old, new))
        for (old, new), names in members.items()
    ]


def _fate(old: str, new: str) -> tuple[str, str]:
    if old == new:
        return "all", "nothing"
    kept = kept_tensors(old, new)
    fresh = [key for key in STATE_TENSORS[new] if key not in kept.values()]
    fresh += ["step"] if new == "adamw" else []
    told = (f"{before} as {after}" for before, after in kept.items())
    return ", ".join(told) or "nothing", ", ".join(fresh) or "nothing"
