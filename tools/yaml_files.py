"""YAML files by themselves, and put together as NeMo-RL does it.

Ours are put together by Hydra (`nemo_like/config/compose.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_like.config.draft import split, walk
from nemo_like.config.layers import INHERITS, Files, Interpolation, load_file, origins_of, shown
from nemo_like.errors import ConfigError

OVERRIDES = "_override_"
"""The key that makes a section replace the inherited one, instead of adding to it."""


def read_inherited(file: Path) -> Files:
    """A file on top of those that its `defaults` name by their paths: NeMo-RL's inheritance."""
    files = Files.of({})
    _inherit(file.resolve(), files, ())
    return files


def _inherit(file: Path, files: Files, below: tuple[Path, ...]) -> None:
    if file in below:
        chain = " -> ".join(str(shown(f)) for f in (*below, file))
        raise ConfigError(f"files that inherit each other: {chain}")
    loaded = load_file(file)
    parents = loaded.pop(INHERITS, None)
    for name in [parents] if isinstance(parents, str) else parents or []:
        parent = (file.parent / str(name)).resolve()
        if not parent.is_file():
            where = origins_of(file, (), layer=0)[split(INHERITS)].text
            raise ConfigError(
                f"{where}: there is no such file: {shown(parent)}; copy it to there too"
            )
        _inherit(parent, files, (*below, file))
    try:
        _make_room(files.values, loaded)
        files.values = OmegaConf.merge(files.values, loaded)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        reason = f"{str(error).splitlines()[0]} under one key; say {OVERRIDES}: true above it"
        raise ConfigError(f"{shown(file)} and what it inherits: {reason}") from error
    files.add(file)


def _make_room(below: DictConfig, loaded: DictConfig) -> None:
    """Take the flags out of a file, and from below it the sections that they are in."""
    raw = OmegaConf.to_container(loaded, resolve=False)
    for path, flag in walk(raw):
        if path[-1] == OVERRIDES:
            for values, name in ((loaded, path), *([(below, path[:-1])] if flag is True else [])):
                holder = OmegaConf.select(values, ".".join(name[:-1])) if name[1:] else values
                if isinstance(holder, DictConfig):
                    holder.pop(name[-1], None)


def as_written(value: Any) -> Any:
    """Values as a file has them, each text an `Interpolation`."""
    if isinstance(value, dict):
        return {name: as_written(below) for name, below in value.items()}
    if isinstance(value, list):
        return [as_written(item) for item in value]
    return Interpolation(value) if isinstance(value, str) else value
