"""Hydra composes files, groups and overrides into one `Draft`: the only home of Hydra.

Hydra's parser reads the overrides, and its defaults lists say which files, in which order. Value
overrides are applied here, every one as `++` (whether a key exists is the schema's affair), and so
are deletions: Hydra refuses to delete a key that is present with null, and stops at one error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_like.config.draft import COMMAND_LINE, Draft, Origin, Problem, find, split, walk
from nemo_like.config.layers import Files, parents_of, shown, values_of, why_unreadable
from nemo_like.config.report import nearest_choice
from nemo_like.config.schema import Key, is_known
from nemo_like.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"

IMPORT = "uv run tools/config_cli.py import"
"""What translates a recipe of NeMo-RL."""
NAMES = "files are named from configs/, without ending: defaults: [sft, _self_]"

RESOLVERS: dict[str, Callable[..., Any]] = {
    "add": lambda *numbers: sum(numbers),
    "mul": lambda *numbers: math.prod(numbers),
    "div": lambda a, b: a / b,
    "max": lambda *numbers: max(numbers),
}


@dataclass(frozen=True)
class Schema:
    """What composing needs to know of the tree: its keys, and its defaults for interpolations."""

    known: dict[str, Key]
    defaults: dict[str, Any]


@dataclass(frozen=True)
class Overrides:
    """Parsed overrides: config groups for Hydra, values in their order, and what a sweep varies."""

    groups: tuple[str, ...]
    values: tuple[Override, ...]
    swept: tuple[str, ...]


def find_config(name: str) -> Path | None:
    """The file that `--config` means: from here, from the repository, or from its `configs/`."""
    for folder in (Path.cwd(), ROOT, CONFIGS):
        path = (folder / name).resolve()
        if path.is_file():
            return path
    return None


def parse_overrides(
    texts: Sequence[str], *, multirun: bool
) -> tuple[list[Overrides], list[Problem]]:
    """One set of overrides per combination of choices (one without `--multirun`), and problems."""
    parser = OverridesParser.create()
    choices: list[list[Override]] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            (override,) = parser.parse_overrides([text])
            problem = _sweep_problem(override, multirun=multirun)
            if problem is None:
                choices.append(_choices(override, parser))
        except HydraException as error:
            problem = f"this is no override (key=value): {_first_line(error)}"
        if problem is not None:
            problems.append(Problem(problem, origin=_line(0, text)))
    swept = [index for index, among in enumerate(choices) if len(among) > 1]
    combinations = [
        Overrides(
            groups=tuple(_text(o) for o in combination if _is_group(o)),
            values=tuple(o for o in combination if not _is_group(o)),
            swept=tuple(_text(combination[index]).lstrip("+") for index in swept),
        )
        for combination in itertools.product(*choices)
    ]
    return combinations, problems


def _sweep_problem(override: Override, *, multirun: bool) -> str | None:
    if not override.is_sweep_override():
        return None
    if not multirun:
        return (
            "several values are a sweep, which needs --multirun; "
            "a list is written [a,b], a text with commas in quotes: key='\"a,b\"'"
        )
    if not override.is_discrete_sweep() or override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return "a sweep names its values: key=a,b or key=range(1,4)"
    return None


def _choices(override: Override, parser: OverridesParser) -> list[Override]:
    if not override.is_sweep_override():
        return [override]
    key = override.get_key_element()
    texts = [f"{key}={value}" for value in override.sweep_string_iterator()]
    return list(parser.parse_overrides(texts))


def _is_group(override: Override) -> bool:
    return "/" in override.key_or_group or override.package is not None


def read_files(path: Path, groups: Sequence[str]) -> Files:
    """What `path`, its defaults list and the chosen groups say, with the line of every key."""
    try:
        return _read_files(path, groups)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{shown(path)} can not be read: {_reason(error, path)}") from error


def _read_files(path: Path, groups: Sequence[str]) -> Files:
    overrides = [f"hydra.searchpath=[file://{CONFIGS}]"]
    with initialize_config_dir(str(path.parent), version_base=None, job_name="nemo_like"):
        loader = GlobalHydra.instance().config_loader()
        parts = loader.compute_defaults_list(path.stem, overrides, RunMode.RUN)
        if groups:
            chosen = parts.overrides.known_choices
            overrides += [_as_hydra_wants(text, chosen) for text in groups]
            parts = loader.compute_defaults_list(path.stem, overrides, RunMode.RUN)
    files = Files.of({})
    values: dict[str, Any] = {}
    for part in parts.defaults:
        name = part.config_path or ""
        found = [f for f in (path.parent / f"{name}.yaml", CONFIGS / f"{name}.yaml") if f.is_file()]
        if found and not name.startswith("hydra/"):
            package = split(part.package) if part.package else ()
            values = _overlay(values, values_of(found[0], package))
            files.add(found[0], package)
    files.values = OmegaConf.create(values)
    return files


def _reason(error: Exception, path: Path) -> str:
    """What Hydra or YAML say, without the search path; and the cure for NeMo-RL's `defaults`."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        guess = nearest_choice(choice, error.options)
        text = f"{group}={choice}: there is no such file; there are {', '.join(error.options)}"
        return text + (f"; did you mean {group}={guess}?" if guess else "")
    if isinstance(error, yaml.YAMLError) or (isinstance(error, OSError) and error.strerror):
        return why_unreadable(error)
    lines = str(error).partition("Config search path")[0].splitlines()
    text = " ".join(line.strip() for line in lines if line.strip())
    parents = parents_of(path)
    named = [parents] if isinstance(parents, str) else [p for p in parents if isinstance(p, str)]
    if any(name.startswith("..") or name.endswith((".yaml", ".yml")) for name in named):
        return (
            f"its `defaults` are paths. This looks like a recipe of NeMo-RL: {IMPORT} {shown(path)}"
            f"; if it is not, {NAMES}"
        )
    return f"{text}; {NAMES}" if "defaults must be a list" in text else text


def _as_hydra_wants(text: str, chosen: Mapping[str, Any]) -> str:
    """A group choice, appended or replaced as the defaults list has it: users need not know."""
    bare = text.lstrip("+")
    if bare.startswith("~"):
        return bare
    return bare if bare.split("=")[0] in chosen else f"+{bare}"


def apply(files: Files, overrides: Sequence[Override], schema: Schema) -> Draft:
    """The files with the overrides on top, interpolations resolved."""
    values = files.values.copy()
    draft = Draft({}, schema.defaults, dict(files.origins))
    if hydra := [path for path in files.origins if path[0] == "hydra"]:
        reason = "Hydra reads files here and nothing else: its own settings have no effect"
        draft.problems.append(Problem(reason, ("hydra",), files.origins[hydra[0]]))
    for layer, override in enumerate(overrides, start=len(files.parts)):
        origin, key = _line(layer, _text(override)), override.key_or_group
        if override.is_delete():
            message = _delete(values, override, schema)
            for path in [p for p in draft.origins if p[: len(split(key))] == split(key)]:
                del draft.origins[path]
        else:
            message = _set(values, override)
            _remember_override(draft, override, origin)
        if message:
            draft.problems.append(Problem(message, (key,), origin))
    _drop_overridden_sections(values, draft)
    _resolve(values, draft, schema)
    return draft


def _set(values: DictConfig, override: Override) -> str | None:
    key, value = override.key_or_group, override.value()
    try:
        merge = isinstance(value, dict) and isinstance(OmegaConf.select(values, key), DictConfig)
        OmegaConf.update(values, key, value, merge=merge)
    except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
        return f"can not be set: {_first_line(error)}"
    return None


def _remember_override(draft: Draft, override: Override, origin: Origin) -> None:
    key, value = split(override.key_or_group), override.value()
    for n in range(1, len(key)):
        draft.origins.setdefault(key[:n], origin)
    draft.origins[key] = origin
    if isinstance(value, dict):
        draft.origins |= {path: origin for path, _ in walk(value, key)}


def _delete(values: DictConfig, override: Override, schema: Schema) -> str | None:
    """Take a key out, so that its default holds again; the message if that is not possible."""
    key = override.key_or_group
    plain = OmegaConf.to_container(values, resolve=False)
    written, value = find(plain, split(key))
    if not written:
        if not is_known(key, schema.known):
            return "there is no such key to delete"
        value = find(schema.defaults, split(key))[1]
    if "=" in _text(override) and override.value() != value:
        return f"its value is {value!r}, so it was not deleted"
    if written:
        *parents, last = split(key)
        parent = OmegaConf.select(values, ".".join(parents)) if parents else values
        del parent[int(last) if isinstance(parent, ListConfig) else last]
    return None


def _drop_overridden_sections(values: DictConfig, draft: Draft) -> None:
    """`_override_: true` replaces a section: what earlier layers wrote into it goes."""
    plain = OmegaConf.to_container(values, resolve=False)
    for path, flag in list(walk(plain)):
        if path[-1] != "_override_":
            continue
        section, layer = path[:-1], draft.origin(path).layer
        holder = OmegaConf.select(values, ".".join(section)) if section else values
        del holder["_override_"]
        for below, _ in list(walk(find(plain, section)[1], section)) if flag is True else []:
            if draft.origin(below).layer < layer and find(plain, below)[0]:
                _forget(values, below)


def _forget(values: DictConfig, path: tuple[str, ...]) -> None:
    parent = OmegaConf.select(values, ".".join(path[:-1])) if path[1:] else values
    if isinstance(parent, DictConfig) and path[-1] in parent:
        del parent[path[-1]]


def _resolve(values: DictConfig, draft: Draft, schema: Schema) -> None:
    """Fill `draft.values`: interpolations see the written values on top of the defaults."""
    for name, function in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
    written = OmegaConf.to_container(values, resolve=False)
    whole = OmegaConf.create(_overlay(schema.defaults, written))
    draft.values = _resolved(written, whole, (), draft)


def _overlay(base: Any, top: Any) -> Any:
    """Sections key by key; of anything else, a list and a section too, what is on top."""
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    return base | {name: _overlay(base.get(name), value) for name, value in top.items()}


def _resolved(written: Any, whole: Any, path: tuple[str, ...], draft: Draft) -> Any:
    """The shape of `written` with the values of `whole`."""
    pairs = enumerate(written) if isinstance(written, list) else written.items()
    result: dict[Any, Any] = {}
    for name, value in pairs:
        here = (*path, str(name))
        try:
            found = whole[name]
        except OmegaConfBaseException as error:
            origin = draft.origin(here)
            draft.problems.append(Problem(_missing(value, error), (".".join(here),), origin))
            continue
        if isinstance(value, dict | list) and isinstance(found, DictConfig | ListConfig):
            result[str(name)] = _resolved(value, found, here, draft)
        elif isinstance(found, DictConfig | ListConfig):
            result[str(name)] = OmegaConf.to_container(found, resolve=True)
        else:
            result[str(name)] = found
    return list(result.values()) if isinstance(written, list) else result


def _missing(value: Any, error: Exception) -> str:
    if value == "???":
        return "needs a value: the file leaves it open (???)"
    return f"{value} can not be resolved: {_first_line(error)}"


def _text(override: Override) -> str:
    return override.input_line or ""


def _line(layer: int, text: str) -> Origin:
    return Origin(layer, COMMAND_LINE + text)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
