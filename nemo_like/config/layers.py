"""YAML files as layers of a configuration: which keys each writes and where, read and written.

Hydra puts them together (`compose.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_like.config.draft import Origin
from nemo_like.errors import ConfigError

INHERITS = "defaults"
"""The key that names the files below a file."""


@dataclass
class Files:
    """What the files of a configuration say, in the order in which they were merged."""

    values: DictConfig
    origins: dict[tuple[str, ...], Origin] = field(default_factory=dict)
    parts: list[tuple[Path, tuple[str, ...]]] = field(default_factory=list)
    """Each file with the section that it is put into; its position is its layer."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> Files:
        """Values that no file holds."""
        return cls(OmegaConf.create(values))

    @property
    def raw(self) -> dict[str, Any]:
        """The merged values, interpolations as they are written."""
        values: dict[str, Any] = OmegaConf.to_container(self.values, resolve=False)  # type: ignore
        return values

    def add(self, file: Path, package: tuple[str, ...] = ()) -> None:
        """Note where the topmost file writes its keys; its values are merged elsewhere."""
        self.origins |= origins_of(file, package, layer=len(self.parts))
        self.parts.append((file, package))


def origins_of(
    file: Path, package: tuple[str, ...], *, layer: int
) -> dict[tuple[str, ...], Origin]:
    """Every key that a file writes, with its line."""
    root = yaml.compose(file.read_text(), Loader=yaml.CSafeLoader)
    return {path: Origin(layer, f"{shown(file)}:{line}") for path, line in _lines(root, package)}


def _lines(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        below = (*path, key.value)
        yield below, key.start_mark.line + 1
        yield from _lines(value, below)


def shown(file: Path) -> Path:
    """A path as it is printed: from here, where it lies below."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def values_of(file: Path, package: tuple[str, ...] = ()) -> dict[str, Any]:
    """What one file says by itself, interpolations as they are written."""
    values: Any = OmegaConf.to_container(load_file(file), resolve=False)
    values.pop(INHERITS, None)
    for name in reversed(package):
        values = {name: values}
    return values  # type: ignore[no-any-return]


def parents_of(file: Path) -> Any:
    """What a file inherits from, as it says it; nothing is an empty list."""
    values: Any = OmegaConf.to_container(load_file(file), resolve=False)
    return values.get(INHERITS, [])


def load_file(file: Path) -> DictConfig:
    """One file, interpolations as they are written."""
    try:
        loaded = OmegaConf.load(file)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{shown(file)} can not be read: {why_unreadable(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{shown(file)} holds a list; a configuration is a mapping of keys")
    return loaded


def why_unreadable(error: Exception) -> str:
    """What the system, YAML or OmegaConf say, in a line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).strip().split("\n")[0]


class Interpolation(str):
    """A text whose `${...}` is meant."""


def as_yaml(values: dict[str, Any]) -> str:
    """YAML that composes to exactly these values: `${` is escaped, but for an `Interpolation`."""
    return str(OmegaConf.to_yaml(OmegaConf.create(_escaped(values))))


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _escaped(below) for name, below in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, Interpolation):
        return str(value)
    return value.replace("${", "\\${") if isinstance(value, str) else value
