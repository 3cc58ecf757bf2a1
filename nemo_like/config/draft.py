"""A composed configuration before validation: plain values that know where they were written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_SHOWN = 60
"""Characters of a value in a message."""
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where a value was written; a later `layer` (file, then override) wins over an earlier one."""

    layer: int
    text: str = ""


DEFAULT = Origin(-1, "default")
COMMAND_LINE = "command line: "
"""How the text of an origin begins that is an override."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and the (dotted) keys it is about.

    `origin` and `found` are given where the draft no longer holds the value.
    """

    message: str
    keys: tuple[str, ...] = ()
    origin: Origin | None = None
    found: str = ""


@dataclass
class Draft:
    """Values as nested dicts, and the origin of every key that someone wrote."""

    values: dict[str, Any]
    defaults: dict[str, Any]
    origins: dict[Path, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def find(self, path: str | Path) -> tuple[bool, Any]:
        """Whether somebody wrote this key, and its value."""
        return find(self.values, split(path))

    def seen(self, path: str) -> tuple[bool, Any, Origin]:
        """Whether a key has a value, written or by default; the value; where it comes from."""
        found, value = self.find(path)
        if found:
            return True, value, self.origin(path)
        return (*find(self.defaults, split(path)), DEFAULT)

    def take(self, path: str | Path) -> Any:
        """The value of a key that is there; afterwards it is not."""
        *parents, last = split(path)
        return find(self.values, tuple(parents))[1].pop(last)

    def refuse(self, path: str | Path, message: str) -> None:
        """Take a key out and say why."""
        origin = self.origin(path)
        found = show(self.take(path))
        self.problems.append(Problem(message, (".".join(split(path)),), origin, found))

    def put(self, path: str, value: Any, origin: Origin) -> None:
        """Write a key, unless a later layer has written it already."""
        parts = split(path)
        if self.find(path)[0] and self.origin(path).layer > origin.layer:
            return
        section = self.values
        for part in parts[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[parts[-1]] = value
        self.origins[parts] = origin

    def move(self, source: str, target: str) -> None:
        """Rename a key, if it is there."""
        if self.find(source)[0]:
            origin = self.origin(source)
            self.put(target, self.take(source), origin)

    def origin(self, path: str | Path) -> Origin:
        """Where the value of a key comes from: written itself, or with the section around it."""
        parts = split(path)
        for n in range(len(parts), 0, -1):
            if parts[:n] in self.origins:
                return self.origins[parts[:n]]
        below = [o for p, o in self.origins.items() if p[: len(parts)] == parts]
        return max(below, default=DEFAULT)


def show(value: Any) -> str:
    """A value as a user would type it, shortened."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.replace("\n", "\\n")
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def split(path: str | Path) -> Path:
    """The parts of a dotted path; a tuple is split already (its parts may hold dots)."""
    return tuple(path.split(".")) if isinstance(path, str) else path


def find(values: Any, path: Path) -> tuple[bool, Any]:
    """Whether the nested values hold this path, and what they hold there."""
    for part in path:
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return False, None
    return True, values


def walk(values: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every key of nested dicts with its value, parents first; lists count as values."""
    for name, value in values.items():
        yield (*path, str(name)), value
        if isinstance(value, dict):
            yield from walk(value, (*path, str(name)))


def leaves(values: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key with a value of its own: lists and empty sections are values."""
    for path, value in walk(values):
        if (not isinstance(value, dict) or not value) and path[-1] != "_override_":
            yield path, value


def differing(*trees: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The keys in which nested values differ, each with what every one of them has there.

    Of a section that some of them lack there is the section alone.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(name for tree in trees for name in tree):
        values = [tree[name] for tree in trees if name in tree]
        is_everywhere = len(values) == len(trees)
        if is_everywhere and all(isinstance(value, dict) for value in values):
            found |= {f"{name}.{below}": sides for below, sides in differing(*values).items()}
        elif not is_everywhere or any(value != values[0] for value in values):
            found[name] = tuple(show(t[name]) if name in t else "(absent)" for t in trees)
    return found
