"""Optimizer states that other programs saved, as a tree of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_like.errors import CheckpointError
from nemo_like.optim.routing import Algorithm

ANY = object()
OF_GROUP = "group."


@dataclass(frozen=True)
class Form:
    """How some optimizer keeps what one of our algorithms remembers.

    A parameter has this form if its group has all of `group` and nothing of `without`, and its
    state the values of `keys` (ours to theirs) and of `also`, and no more; a value may also be one
    of the group's. Where `decay` names a setting of the group, the momentum is a sum and not an
    average, and (1 - decay) times as much is ours.
    """

    source: str
    algorithm: Algorithm
    keys: Mapping[str, str]
    group: Mapping[str, Any]
    without: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()
    decay: str | None = None

    @property
    def state_keys(self) -> frozenset[str]:
        """What the state of a parameter has."""
        return self.also | {key for key in self.keys.values() if not key.startswith(OF_GROUP)}

    def fits(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
        """Whether the state of a parameter of this group has this form."""
        return (
            all(key in group and value in (ANY, group[key]) for key, value in self.group.items())
            and self.without.isdisjoint(group)
            and self.state_keys == state.keys()
        )


def _adamw(exp_avg: str, exp_avg_sq: str, step: str) -> dict[str, str]:
    return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}


_BUFFER = {"momentum_buffer": "momentum_buffer"}
_TAGGED = frozenset(("use_muon",))
_OF_DION = {"mu": ANY, "algorithm": "adamw"}
FORMS = (
    # AdamW, of torch and beside Keller Jordan's Muon.
    Form("AdamW", "adamw", _adamw("exp_avg", "exp_avg_sq", "step"), group={"betas": ANY}),
    Form("torch.optim.Muon", "muon", _BUFFER, group={"momentum": ANY, "adjust_lr_fn": ANY}),
    Form("MuonWithAuxAdam", "muon", _BUFFER, group={"momentum": ANY, "use_muon": True}),
    Form(
        "Keller Jordan's Muon",
        "muon",
        _BUFFER,
        group={"momentum": ANY, "weight_decay": ANY},
        without=frozenset(("dampening", "nesterov", "use_muon")),  # SGD has the first two
    ),
    Form(
        "Moonlight's Muon",
        "muon",
        _BUFFER,
        group={"momentum": ANY, "adamw_betas": ANY},
        also=_TAGGED,
        decay="momentum",
    ),
    Form(
        "Moonlight's AdamW",
        "adamw",
        _adamw("moment1", "moment2", "step"),
        group={"adamw_betas": ANY},
        also=_TAGGED,
    ),
    Form(
        "dion's Muon",
        "muon",
        {"momentum_buffer": "momentum"},
        group={"mu": ANY, "algorithm": "muon"},
        decay="mu",
    ),
    Form("dion's AdamW", "adamw", _adamw("momentum", "variance", "group.step"), group=_OF_DION),
    Form("dion's AdamW", "adamw", _adamw("momentum", "variance", "step_dev"), group=_OF_DION),
)
"""The forms that are understood.

Source: `torch.optim`; https://github.com/KellerJordan/Muon; https://github.com/MoonshotAI/Moonlight
(examples); https://github.com/microsoft/dion. The first two average, the others accumulate.
"""


def read_foreign(
    saved: Any, shapes: Mapping[str, Sequence[int]], names: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """A tree as `CombinedOptimizer.state_tree` gives it, and the owner of each parameter in it.

    `saved` is what a torch optimizer's `state_dict()` gave; `shapes` are those of the model's
    parameters. `names` are the parameters in the order in which the optimizer has them; without,
    the state must have `param_names`.

    Raises:
        CheckpointError: it is no such dict, has no names, is of other parameters, or has a form
            that is not understood; the message says what was found.
    """
    tree: dict[str, Any] = {"state": {}, "steps": {}}
    owners: dict[str, str] = {}
    for group, index, name in _members(saved, names):
        if name in owners or name not in shapes:
            why = "there twice" if name in owners else "no parameter of the model"
            raise CheckpointError(f"{name} is {why}, expected each of its parameters once")
        state = saved["state"].get(index, {})
        form = _form_of(name, group, state)
        values = {f"{OF_GROUP}{key}": value for key, value in group.items()} | state
        found = {ours: values[theirs] for ours, theirs in form.keys.items()}
        if "step" in found:
            tree["steps"][name] = int(found.pop("step"))
        factor = 1.0 if form.decay is None else 1.0 - float(group[form.decay])
        tree["state"][name] = {
            key: _checked(tensor, f"{key} of {name}", shapes[name]) * factor
            for key, tensor in found.items()
        }
        owners[name] = form.algorithm
    return tree, owners


def _members(
    saved: Any, names: Sequence[str] | None
) -> Iterator[tuple[Mapping[str, Any], Any, str]]:
    """Group, index and name of each parameter."""
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        found = ", ".join(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise CheckpointError(
            "a dict with state and param_groups was expected, as an optimizer's state_dict() "
            f"is one; found {found}"
        )
    groups = saved["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    if names is None:
        if not all("param_names" in group for group in groups):
            raise CheckpointError(
                f"the state has numbers and no names for its {count} parameters: give their names, "
                "in the order in which the optimizer has them"
            )
        names = [name for group in groups for name in group["param_names"]]
    if len(names) != count:
        raise CheckpointError(f"{len(names)} names were given for {count} parameters")
    remaining = iter(names)
    for group in groups:
        for index in group["params"]:
            # `DistributedDataParallel` and `torch.compile` put something before each name.
            yield group, index, next(remaining).removeprefix("module.").removeprefix("_orig_mod.")


def _form_of(name: str, group: Mapping[str, Any], state: Mapping[str, Any]) -> Form:
    for form in FORMS:
        if form.fits(group, state):
            return form
    known = "; ".join(f"{', '.join(sorted(form.state_keys))} ({form.source})" for form in FORMS)
    raise CheckpointError(
        f"the state of {name} is none that is understood: it has "
        f"{', '.join(map(str, state)) or 'nothing, so it was never stepped'}, in a group with "
        f"{', '.join(map(str, group))}; expected {known}"
    )


def _checked(tensor: Any, what: str, shape: Sequence[int]) -> Tensor:
    """The tensor in fp32 at least, if it is what it should be."""
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != tuple(shape):
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CheckpointError(f"{what} is {found}, the parameter is {tuple(shape)}")
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{what} is not finite")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
