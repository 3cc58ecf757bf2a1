"""A draft becomes one frozen tree, or a list of everything that is wrong with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import ValidationError

from nemo_like.config.base import DEFER_CONFLICTS, conflicts_of
from nemo_like.config.draft import Draft, Problem, find, split
from nemo_like.config.report import unknown_key, wrong_value
from nemo_like.config.schema import MAPPING_OF, Key
from nemo_like.config.tree import RunTree

Tree = TypeVar("Tree", bound=RunTree)


def validate(
    draft: Draft, tree: type[Tree], known: dict[str, Key], *, to_run: bool = True
) -> tuple[Tree | None, list[Problem]]:
    """The tree if nothing is wrong; conflicts between fields are looked for among the good ones.

    Where nothing is going to run, what would only end a run becomes a note of the draft.
    """
    problems = list(draft.problems)
    wrong = {key for problem in problems for key in problem.keys}
    values = draft.values
    for _ in range(2):
        try:
            node = _parse(values, tree)
            break
        except ValidationError as error:
            found = _field_problems(error, draft, known)
            problems += found
            wrong |= {key for problem in found for key in problem.keys}
            values = _without(values, (key for problem in found for key in problem.keys))
    else:
        return None, problems
    for conflict in conflicts_of(node):
        if any(_touches(key, bad) for key in conflict.keys for bad in wrong):
            continue
        if conflict.only_to_run and not to_run:
            draft.notes.append(f"{', '.join(conflict.keys)}: {conflict.message}; a run needs it")
        else:
            problems.append(Problem(conflict.message, conflict.keys))
    return (None if problems else node), problems


def _parse(values: dict[str, Any], tree: type[Tree]) -> Tree:
    """Strict, as JSON: lists are tuples, whole numbers may be floats, nothing else is converted."""
    text = json.dumps(values, default=str)
    return tree.model_validate_json(text, strict=True, context=DEFER_CONFLICTS)


def field_problems(draft: Draft, tree: type[Tree], known: dict[str, Key]) -> list[Problem]:
    """What is wrong with fields by themselves; each problem has one key."""
    try:
        _parse(draft.values, tree)
    except ValidationError as error:
        return _field_problems(error, draft, known)
    return []


def _field_problems(error: ValidationError, draft: Draft, known: dict[str, Key]) -> list[Problem]:
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        path = _where(detail["loc"], draft.values)
        if path in found:  # the other arms of a union
            continue
        value = draft.find(path)[1]
        if detail["type"] == "extra_forbidden":
            message = unknown_key(path, known)
        else:
            message = wrong_value(value, _key(path, known))
        found[path] = Problem(message, (path,))
    return list(found.values())


def _where(loc: tuple[int | str, ...], values: Any) -> str:
    """The dotted path of an error: its location without the arms of unions."""
    path: list[str] = []
    for part in loc:
        there, below = find(values, (str(part),))
        if there:
            path.append(str(part))
            values = below
    return ".".join(path)


def _key(path: str, known: dict[str, Key]) -> Key:
    """The schema's entry for a path, or for the list that it is in, or for a value of a mapping."""
    parts = [part for part in split(path) if not part.isdigit()]
    if ".".join(parts) in known:
        return known[".".join(parts)]
    while ".".join(parts) not in known:
        parts.pop()
    mapping = known[".".join(parts)]
    return replace(mapping, type=mapping.type.removeprefix(MAPPING_OF))


def _without(values: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """A copy without these keys; of a list with a bad element the whole list is left out."""
    values = copy.deepcopy(values)
    for path in paths:
        parts = split(path)
        while parts:
            *parents, last = parts
            holder = find(values, tuple(parents))[1]
            if isinstance(holder, dict):
                holder.pop(last, None)
                break
            parts = tuple(parents)
    return values


def _touches(key: str, bad: str) -> bool:
    return f"{key}.".startswith(f"{bad}.") or f"{bad}.".startswith(f"{key}.")
