"""The tree as text for `--help`, from the schema alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_like.config.base import Node
from nemo_like.config.schema import Key, keys


def help_text(tree: type[Node], wanted: Sequence[str], *, options: Mapping[str, str]) -> str:
    """Every key whose path contains one of the words (without words: all), one entry each."""
    found = [k for k in keys(tree) if not wanted or any(word in k.path for word in wanted)]
    lines = [f"{tree.__doc__}", "", "Options:"]
    lines += [f"  {name} {line}" for name, line in options.items()]
    lines += ["", "Keys, set by key=value (++key=value is the same; ~key returns to the default):"]
    for key in found:
        lines += _section(key) if key.section else _lines(key)
    if not found:
        lines.append(f"  none contains {' or '.join(wanted)}")
    return "\n".join(lines) + "\n"


def _section(key: Key) -> list[str]:
    return ["", f"{key.path}: {key.line}"]


def _lines(key: Key) -> list[str]:
    return [f"  {key.path} = {value_text(key.default)}    ({key.type})", f"      {key.line}"]


def value_text(value: Any) -> str:
    """A default as a user would write it."""
    if isinstance(value, str):
        return value or "''"
    return json.dumps(value)
