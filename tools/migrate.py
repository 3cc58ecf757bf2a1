"""A recipe of NeMo-RL becomes a configuration of ours, and every one of its keys has a fate."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemo_like.config import compat, compose, torch_optimizers
from nemo_like.config.absent import ABSENT, IGNORED
from nemo_like.config.data import BUNDLED
from nemo_like.config.draft import DEFAULT, Draft, Origin, Problem, find, leaves, show, split
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.layers import Files, Interpolation
from nemo_like.config.megatron import NOT_HERE
from nemo_like.config.schema import Key, defaults, is_known, known_paths
from nemo_like.config.sft import SFTTree
from nemo_like.config.tree import RunTree
from nemo_like.config.validate import field_problems, validate
from nemo_like.errors import ConfigError
from tools.yaml_files import read_inherited

_MEGATRON = "policy.megatron_cfg"
TREES: dict[str, type[RunTree]] = {"sft": SFTTree, "grpo": GRPOTree}
NOT_CARRIED = {
    "logger.tensorboard.log_dir": "event files lie in the run's log folder, as NeMo-RL's do too",
    "policy.make_sequence_length_divisible_by": "it follows from the layout of the active backend",
    **{f"{_MEGATRON}.{key}": reason for key, reason in NOT_HERE.items()},
}
"""Keys of ours that NeMo-RL's files set for every model and layout, and that few can have."""
BY_BUDGET = {
    "sft.val_micro_batch_size": "batches of validation are cut by the token budget, as others are"
}
"""What is not carried over where micro-batches have a token budget."""
MUON_OF_MEGATRON = {
    "muon_extra_scale_factor": 1.0,
    "muon_tp_mode": "blockwise",
    "muon_split_gate_up": False,
    "muon_clip": "all",
    "muon_zero_grad": "always",
}
"""What megatron-core's Muon does where a recipe says nothing, and ours does not."""
WHAT_IS_LEARNED = (
    *("policy.dtensor_cfg.lora_cfg", "policy.megatron_cfg.peft"),
    *("policy.optimizer", "policy.scheduler", "policy.precision"),
    *("data", "env", "loss_fn", "grpo.adv_estimator", "reward_penalties"),
    "on_policy_distillation",
)
"""Sections whose absent values make another run of it, not a slower or a quieter one."""

_OF_CONVERSATIONS = {
    f"data.{name}.{key}": reason
    for name in ("train", "validation")
    for key, reason in compat.OF_CONVERSATIONS.items()
}

Kind = Literal["kept", "said differently", "off", "ignored", "absent", "unknown"]
LEFT_OUT: tuple[Kind, ...] = ("ignored", "absent", "unknown")
"""Kinds of which something is lost; `off` asks for what happens anyway."""


@dataclass(frozen=True)
class Fate:
    """What became of one key, and why it is not what it was."""

    path: str
    kind: Kind
    value: Any
    origin: Origin
    reason: str = ""
    entry: str = ""
    """The key that the reason is about: this one, or a section around it."""


@dataclass(frozen=True)
class Migration:
    """What a recipe says in our language.

    `values` are sparse. `conflicts` are what is wrong between them: the recipe does not run as it
    is until somebody decides. `added` are keys that the recipe leaves to defaults other than ours,
    each with the reason.
    """

    tree: type[RunTree]
    values: dict[str, Any]
    fates: tuple[Fate, ...]
    conflicts: tuple[Problem, ...]
    draft: Draft
    added: tuple[str, ...] = ()

    @property
    def needs_decision(self) -> bool:
        """Whether it would not run as it is, or would learn something else."""
        return bool(self.conflicts) or any(
            fate.kind == "unknown"
            or fate.kind == "absent"
            and f"{fate.entry}.".startswith(tuple(f"{key}." for key in WHAT_IS_LEARNED))
            for fate in self.fates
        )


def migrate(file: Path) -> Migration:
    """The configuration of a NeMo-RL recipe, read with the files that it inherits from.

    Raises:
        ConfigError: a file is missing or no recipe of an algorithm that is here.
    """
    files = read_inherited(file)
    tree = _tree_of(files, file)
    schema = compose.Schema(known_paths(tree), defaults(tree))
    draft = compose.apply(files, (), schema)
    written = copy.deepcopy(draft.values)
    raw = files.raw
    origins = dict(draft.origins)
    compat.translate(draft)
    ignored = _leave_out(draft)
    added = tuple(_said_outright(draft))
    unknown = _refuse_fields(draft, tree, schema)
    conflicts = validate(draft, tree, schema.known, to_run=False)[1][len(draft.problems) :]
    conflicts += _unknown_data_sets(draft)
    theirs = Draft(written, draft.defaults, origins)
    judge = _Judge(draft, theirs, schema.known, unknown, ignored)
    fates = [judge.fate(".".join(path), value) for path, value in leaves(raw)]
    fates += judge.unnamed(fates)
    values = _with_interpolations(sparse(draft.values, schema.defaults), raw, schema)
    return Migration(tree, values, tuple(fates), tuple(conflicts), draft, added)


def _tree_of(files: Files, file: Path) -> type[RunTree]:
    named = [name for name in TREES if name in files.values]
    if len(named) != 1:
        found = ", ".join(str(key) for key in files.values)
        raise ConfigError(
            f"{file} is no recipe of SFT, GRPO or DAPO: expected one block {' or '.join(TREES)}, "
            f"found {found or 'nothing'}"
        )
    return TREES[named[0]]


def _leave_out(draft: Draft) -> dict[str, str]:
    """Drop what few models can have, and what is said twice; the reasons of all that is dropped."""
    budgets = (f"policy.{block}.enabled" for block in ("dynamic_batching", "sequence_packing"))
    dropped = NOT_CARRIED | (BY_BUDGET if any(draft.find(b)[1] for b in budgets) else {})
    for path in dropped:
        if draft.find(path)[0]:
            draft.take(path)
    for path, source in _said_twice(draft):
        if draft.find(path)[0] and _equal(draft.find(path)[1], draft.seen(source)[1]):
            draft.take(path)
    return IGNORED | dropped


def _said_outright(draft: Draft) -> Iterator[str]:
    """Write what NeMo-RL does where a recipe says nothing, and we do not; what, and why."""
    if not draft.find("data.bad_rows")[0]:
        draft.put("data.bad_rows", "drop", DEFAULT)
        yield (
            "data.bad_rows=drop: NeMo-RL learns nothing from rows that are too long and goes on; "
            "here they are left out, and end the run if they are more than data.max_bad_rows"
        )
    block = f"{_MEGATRON}.optimizer"
    if draft.find(f"{block}.optimizer")[1] in ("muon", "dist_muon"):
        keys = [key for key in MUON_OF_MEGATRON if not draft.find(f"{block}.{key}")[0]]
        for key in keys:
            draft.put(f"{block}.{key}", MUON_OF_MEGATRON[key], DEFAULT)
        if keys:
            values = ", ".join(f"{key}={show(MUON_OF_MEGATRON[key])}" for key in keys)
            reason = (
                "megatron-core's defaults, for the same steps as there; ours are in docs/muon.md"
            )
            yield f"{block} ({values}): {reason}"


def _unknown_data_sets(draft: Draft) -> Iterator[Problem]:
    """Short names that are neither in our table nor names of the hub."""
    for path, source in compat.sources(draft):
        name = source.get("dataset_name")
        if not isinstance(name, str) or "/" in name or name in BUNDLED or source.get("data_path"):
            continue
        if not Path(name).exists():
            yield Problem(
                "a short name that is not known here: name the data set as on the Hugging Face hub "
                "(owner/name) and its columns, or its rows in a file as data_path",
                (f"{path}.dataset_name",),
            )


def _said_twice(draft: Draft) -> Iterator[tuple[str, str]]:
    """Keys that follow another one where they are left out, and that one."""
    decay = f"{_MEGATRON}.optimizer.weight_decay"
    written = decay if draft.find(decay)[1] is not None else "policy.optimizer.weight_decay"
    for end in ("start", "end"):
        yield f"{_MEGATRON}.scheduler.{end}_weight_decay", written
    for block in ("optimizer", "scheduler"):  # both backends start from `policy.<block>`
        for name in list(draft.find(f"{_MEGATRON}.{block}")[1] or {}):
            if find(draft.defaults, ("policy", block, name))[0]:
                yield f"{_MEGATRON}.{block}.{name}", f"policy.{block}.{name}"


def _refuse_fields(draft: Draft, tree: type[RunTree], schema: compose.Schema) -> dict[str, str]:
    """Take out the keys that do not exist and the values that are wrong; why, by their paths."""
    found = field_problems(draft, tree, schema.known)
    for problem in found:
        draft.refuse(problem.keys[0], problem.message)
    return {problem.keys[0]: problem.message for problem in found}


@dataclass(frozen=True)
class _Judge:
    """What there is to know about the keys of a recipe after its translation."""

    draft: Draft
    theirs: Draft
    known: dict[str, Key]
    unknown: dict[str, str]
    ignored: dict[str, str]

    def fate(self, path: str, value: Any) -> Fate:
        """What became of a key."""
        origin = self.theirs.origin(path)
        targets = self._targets(path)
        for key in (path, *targets):
            for kind, reasons in self._tables():
                if entry := entry_of(key, reasons, within=isinstance(value, list)):
                    return Fate(path, kind, value, origin, reasons[entry], entry)
        same = path in targets and is_known(path, self.known)
        return Fate(path, "kept" if same else "said differently", value, origin)

    def unnamed(self, fates: Iterable[Fate]) -> Iterator[Fate]:
        """What was taken out and stands behind no key of the recipe, under our own name."""
        named = {fate.entry for fate in fates}
        for problem in self.draft.problems:
            for key in problem.keys:
                if key not in named:
                    origin = problem.origin or self.draft.origin(key)
                    yield Fate(key, "unknown", problem.found, origin, problem.message, key)

    def _targets(self, path: str) -> tuple[str, ...]:
        """What a key is called here."""
        name = self.theirs.find("policy.optimizer.name")[1]
        return torch_optimizers.targets(path, name) or (_renamed(path),)

    def _tables(self) -> Iterator[tuple[Kind, Mapping[str, str]]]:
        refused = {key: problem.message for problem in self.draft.problems for key in problem.keys}
        if "policy.optimizer.name" in refused:  # its arguments mean nothing by themselves
            refused["policy.optimizer.kwargs"] = refused["policy.optimizer.name"]
        yield "unknown", self.unknown
        yield "absent", refused
        yield "ignored", self.ignored
        yield "off", ABSENT | _OF_CONVERSATIONS


def _renamed(path: str) -> str:
    """The path after a change of names; elements of lists as the tables write them."""
    old, new = compat.RENAMED_SECTION
    if path.startswith(f"{old}."):
        path = new + path.removeprefix(old)
    return compat.RENAMED.get(path, path)


def entry_of(path: str, reasons: Mapping[str, str], *, within: bool) -> str:
    """Where a table speaks of a key: of itself, a section around it, or (`within`) its elements."""
    parts = split(path)
    heads = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    below = (key for key in reasons if within and key.startswith(f"{path}."))
    return next((head for head in heads if head in reasons), "") or next(below, "")


def sparse(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What differs from `base`, nested as it was."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        below = base.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            value = sparse(value, below)
            if value:
                result[name] = value
        elif (
            name not in base or value != below or isinstance(value, bool) != isinstance(below, bool)
        ):
            result[name] = value
    return result


def _equal(a: Any, b: Any) -> bool:
    """Whether two values mean the same: 1 is 1.0, and is not true."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _with_interpolations(
    values: dict[str, Any], raw: dict[str, Any], schema: compose.Schema
) -> dict[str, Any]:
    """The values with the recipe's `${...}` wherever it means the same here."""
    texts = {
        path: text
        for path, text in leaves(raw)
        if isinstance(text, str) and "${" in text and _is_scalar(values, path)
    }
    proposed = copy.deepcopy(values)
    for path, text in texts.items():
        _put(proposed, path, text)
    means = compose.apply(Files.of(proposed), (), schema)
    result = copy.deepcopy(values)
    for path, text in texts.items():
        if means.find(path) == find(values, path):
            _put(result, path, Interpolation(text))
    return result


def _is_scalar(values: dict[str, Any], path: tuple[str, ...]) -> bool:
    found, value = find(values, path)
    return found and not isinstance(value, dict | list)


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    find(values, path[:-1])[1][path[-1]] = value


def account(fates: Iterable[Fate]) -> list[str]:
    """One line per reason: the section it is about, and each key of it that was written."""
    groups: dict[tuple[str, str], list[Fate]] = {}
    for fate in fates:
        groups.setdefault((fate.entry, fate.reason), []).append(fate)
    return [f"{_named(entry, some)}: {reason}" for (entry, reason), some in groups.items()]


def _named(entry: str, fates: list[Fate]) -> str:
    if len(fates) == 1:
        (fate,) = fates
        within = f"{entry} in " if entry.startswith(f"{fate.path}.") else ""
        return f"{within}{fate.path} = {show(fate.value)}"
    inside = (f"{fate.path.removeprefix(entry).lstrip('.')}={show(fate.value)}" for fate in fates)
    return f"{entry} ({', '.join(inside)})"
