"""The tree as a table: every key with its type, default and line, for help, docs and errors."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic.fields import FieldInfo

from nemo_like.config.base import Node

LIMITS = {limits.Gt: ">", limits.Ge: ">=", limits.Lt: "<", limits.Le: "<="}
MAPPING_OF = "mapping of "
NAMES = {bool: "true | false", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key; a `section` holds further keys, an `open` one whatever the user likes.

    `choices` are the values that can be listed, as a user types them.
    """

    path: str
    type: str
    default: Any
    line: str
    section: bool
    open: bool
    choices: tuple[str, ...]


def keys(node: type[Node], prefix: str = "") -> Iterator[Key]:
    """Every key of the tree in the schema's order, a section's own keys before its sections."""
    sections: list[tuple[Key, type[Node]]] = []
    for name, field in node.model_fields.items():
        inner = _nodes(field.annotation)
        key = Key(
            path=f"{prefix}{name}",
            type="section" if inner else type_text(field),
            default=field.get_default(call_default_factory=True),
            line=" ".join((field.description or "").split()),
            section=bool(inner),
            open=get_origin(_without_null(field.annotation)) is dict,
            choices=() if inner else tuple(_choices(field.annotation)),
        )
        if inner:
            sections.append((key, inner[0]))
        else:
            yield key
    for key, inner_node in sections:
        yield key
        yield from keys(inner_node, f"{key.path}.")


def known_paths(tree: type[Node]) -> dict[str, Key]:
    """Every key of the tree by its path."""
    return {key.path: key for key in keys(tree)}


def is_known(path: str, known: dict[str, Key]) -> bool:
    """True for a key of the tree, and for whatever is written below an open one."""
    parts = [part for part in path.split(".") if not part.isdigit()]  # positions in a list
    heads = (".".join(parts[:n]) for n in range(1, len(parts)))
    return ".".join(parts) in known or any(head in known and known[head].open for head in heads)


def defaults(tree: type[Node]) -> dict[str, Any]:
    """The whole tree of defaults, as plain data."""
    return tree().model_dump(mode="json")


def type_text(field: FieldInfo) -> str:
    """The type of a field in words a user types: `int > 0 | null`, `adam | sgd | muon`."""
    return _text(field.annotation, tuple(field.metadata))


def _text(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _text(args[0], args[1:])
    if origin in (Union, types.UnionType):
        return " | ".join(_text(arg) for arg in args)
    if origin is Literal:
        return " | ".join(_value(arg) for arg in args)
    if origin is tuple:
        return f"list of {_text(args[0])}"
    if origin is dict:
        return "mapping" if args[1] is Any else f"{MAPPING_OF}{_text(args[1])}"
    return " ".join(
        [NAMES.get(annotation, getattr(annotation, "__name__", "?")), *_limit(metadata)]
    )


def _choices(annotation: Any) -> Iterator[str]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Annotated, Union, types.UnionType):
        for arg in args[:1] if origin is Annotated else args:
            yield from _choices(arg)
    elif origin is Literal or annotation in NAMES:
        yield from _text(annotation).split(" | ")


def _limit(metadata: tuple[Any, ...]) -> Iterator[str]:
    for limit in metadata:
        if isinstance(limit, FieldInfo):
            yield from _limit(tuple(limit.metadata))
        elif type(limit) in LIMITS:
            (bound,) = (getattr(limit, name) for name in limit.__slots__)
            yield f"{LIMITS[type(limit)]} {bound}"


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _nodes(annotation: Any) -> list[type[Node]]:
    """The node that a field holds: by itself, or null, or in a list."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Node) else []
    found = [node for arg in get_args(annotation) for node in _nodes(arg)]
    return list(dict.fromkeys(found))


def _without_null(annotation: Any) -> Any:
    args = [arg for arg in get_args(annotation) if arg is not type(None)]
    union = get_origin(annotation) in (Union, types.UnionType)
    return args[0] if union and len(args) == 1 else annotation
