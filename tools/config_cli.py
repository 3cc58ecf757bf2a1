"""Looks into configurations, and brings those of NeMo-RL here.

    uv run tools/config_cli.py expand   FILE [key=value ...]     all of it, as --print-config
    uv run tools/config_cli.py minimize FILE                     without what it inherits anyway
    uv run tools/config_cli.py compare  FILE FILE                the keys that differ
    uv run tools/config_cli.py explain  KEY FILE [key=value ...] who writes it, and who wins
    uv run tools/config_cli.py import   THEIRS [--out OURS]      a recipe of NeMo-RL

Files are looked for as by `--config`. The exit code is 1 where `compare` finds a difference or
`minimize --check` a key too many, and 2 for a configuration that is wrong, or an import that needs
a decision before it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_like.config import compose
from nemo_like.config.absent import ABSENT, IGNORED
from nemo_like.config.command_line import parse, to_yaml
from nemo_like.config.draft import DEFAULT, Origin, differing, find, leaves, show, split
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.layers import (
    INHERITS,
    Files,
    as_yaml,
    origins_of,
    parents_of,
    shown,
    values_of,
)
from nemo_like.config.report import report, unknown_key
from nemo_like.config.schema import defaults, is_known, known_paths
from nemo_like.config.sft import SFTTree
from nemo_like.config.tree import RunTree
from nemo_like.errors import ConfigError
from tools.command_line import Parser, run
from tools.migrate import LEFT_OUT, NOT_CARRIED, TREES, Migration, account, entry_of, migrate
from tools.yaml_files import as_written


def main(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    return run(_parser(), argv)


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    expand = commands.add_parser("expand", help="print the whole resolved configuration")
    minimize = commands.add_parser("minimize", help="print a file without what it inherits anyway")
    minimize.add_argument("--check", action="store_true", help="only name such keys; exit 1")
    compare = commands.add_parser("compare", help="print the keys in which two files differ")
    explain = commands.add_parser("explain", help="print who writes a key, and who wins")
    explain.add_argument("key", help="a key, or a section for all that is written in it")
    for command, function in (
        (expand, _expand),
        (minimize, _minimize),
        (compare, _compare),
        (explain, _explain),
    ):
        command.add_argument("file", help="one of our configurations")
        command.add_argument(
            "--algorithm", choices=TREES, help="whose keys; found from the file's own otherwise"
        )
        command.set_defaults(command=function)
    compare.add_argument("other", help="the other one")
    for command in (expand, explain):
        command.add_argument("overrides", nargs="*", help="key=value")
    theirs = commands.add_parser("import", help="translate a recipe of NeMo-RL")
    theirs.add_argument("file", type=Path, help="its YAML, beside the files that it inherits from")
    theirs.add_argument("--out", type=Path, help="where to write ours; else it is printed")
    theirs.add_argument("--force", action="store_true", help="write over a file that is there")
    theirs.set_defaults(command=_import)
    return parser


def _expand(options: argparse.Namespace) -> int:
    print(to_yaml(_tree(options, options.file, options.overrides)), end="")
    return 0


def _compare(options: argparse.Namespace) -> int:
    trees = (
        _tree(options, name, ()).model_dump(mode="json") for name in (options.file, options.other)
    )
    found = differing(*trees)
    for key, sides in found.items():
        print(f"{key}: {' -> '.join(sides)}")
    return int(bool(found))


def _tree(options: argparse.Namespace, name: str, overrides: Sequence[str]) -> RunTree:
    argv = ["--config", name, "--print-config", *overrides]
    return parse(argv, tree=_kind(options, _read(name)), default_config=Path(name)).tree


def _read(name: str) -> Files:
    path = compose.find_config(name)
    if path is None:
        raise ConfigError(f"{name}: there is no such file, neither from here nor in the repository")
    return compose.read_files(path, ())


def _kind(options: argparse.Namespace, files: Files) -> type[RunTree]:
    """GRPO's, if the file has a key that only GRPO has."""
    if options.algorithm:
        return TREES[options.algorithm]
    known = (known_paths(GRPOTree), known_paths(SFTTree))
    written = (".".join(path) for path in files.origins)
    is_grpo = any(is_known(key, known[0]) and not is_known(key, known[1]) for key in written)
    return GRPOTree if is_grpo else SFTTree


def _explain(options: argparse.Namespace) -> int:
    if compose.find_config(options.key) and not compose.find_config(options.file):
        raise ConfigError(f"the key comes before the file: explain {options.file} {options.key}")
    files = _read(options.file)
    tree = _kind(options, files)
    final: Any = _tree(options, options.file, options.overrides).model_dump(mode="json")
    known = known_paths(tree)
    if not is_known(options.key, known):
        absent = ABSENT | IGNORED | NOT_CARRIED
        if entry := entry_of(options.key, absent, within=False):
            raise ConfigError(f"{entry} is absent on purpose: {absent[entry]}")
        raise ConfigError(f"{options.key}: {unknown_key(options.key, known)}")
    combinations, _ = compose.parse_overrides(options.overrides, multirun=False)
    said = [*_said_by_files(files)]
    said += [
        (split(o.key_or_group), o.value(), f"command line: {o.input_line}")
        for o in combinations[0].values
    ]
    below = split(options.key)
    is_section = options.key in known and known[options.key].section
    written = dict.fromkeys(path for path, _, _ in said if path[: len(below)] == below)
    paths = list(written) if is_section else [below]
    for path in paths:
        print(f"{'.'.join(path)} = {show(find(final, path)[1])}")
        there, default = find(defaults(tree), path)
        if there:
            print(f"    {show(default):<40}  {DEFAULT.text} (schema)")
        for where, value, text in said:
            if where == path:
                print(f"    {show(value):<40}  {text}")
    return 0


def _said_by_files(files: Files) -> list[tuple[tuple[str, ...], Any, str]]:
    """Every key, value and place of every file, the last one winning."""
    said = []
    for layer, (file, package) in enumerate(files.parts):
        places = origins_of(file, package, layer=layer)
        for path, value in leaves(values_of(file, package)):
            said.append((path, value, places.get(path, Origin(layer, str(shown(file)))).text))
    return said


def _minimize(options: argparse.Namespace) -> int:
    files = _read(options.file)
    tree = _kind(options, files)
    schema = compose.Schema(known_paths(tree), defaults(tree))
    wanted = compose.apply(files, (), schema)
    file, package = files.parts[-1]
    inherited = _said_by_files(Files(files.values, parts=files.parts[:-1]))
    own = values_of(file, package)
    places = origins_of(file, package, layer=len(files.parts) - 1)
    excess = []
    for path, _ in list(leaves(own)):
        below = [value for where, value, _ in inherited if where == path]
        raw = files.raw
        holder = find(raw, path[:-1])[1]
        if not isinstance(holder, dict) or path[-1] not in holder:
            continue
        if below:
            holder[path[-1]] = below[-1]
        else:
            del holder[path[-1]]
        without = compose.apply(Files.of(raw), (), schema)
        key = ".".join(path)
        if without.seen(key)[:2] == wanted.seen(key)[:2]:
            excess.append(path)
    for path in excess:
        text = f"{'.'.join(path)} is what it inherits"
        print(f"{places[path].text}: {text}", file=sys.stderr)
    if options.check:
        return int(bool(excess))
    print(_without(file, package, own, excess), end="")
    return 0


def _without(
    file: Path, package: tuple[str, ...], own: dict[str, Any], excess: Sequence[tuple[str, ...]]
) -> str:
    """The file's own layer without some keys, and without the sections that are empty then."""
    for path in excess:
        for n in range(len(path), 0, -1):
            holder = find(own, path[: n - 1])[1]
            if n == len(path) or holder[path[n - 1]] == {}:
                del holder[path[n - 1]]
    kept = find(own, package)[1] or {}
    head = [line for line in file.read_text().splitlines() if line.startswith("# @package")]
    parents = parents_of(file)
    body = as_yaml(as_written(({INHERITS: parents} if parents else {}) | kept))
    return "".join(f"{line}\n" for line in head) + body


def _import(options: argparse.Namespace) -> int:
    out: Path | None = options.out
    if out is not None and out.exists() and not options.force:
        raise ConfigError(f"{out} is there already; --force writes over it")
    done = migrate(options.file)
    text = _header(options.file, done) + as_yaml(done.values)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    print(_account(done), file=sys.stderr)
    if done.conflicts:
        decide = report(done.conflicts, done.draft, head="to decide before it runs")
        print(f"\n{decide}", file=sys.stderr)
    if out is not None:
        print(_next(out, done), file=sys.stderr)
    return ConfigError.exit_code if done.needs_decision else 0


def _next(file: Path, done: Migration) -> str:
    """What was written, and what to type next."""
    algorithm = done.tree.algorithm
    command = f"  uv run examples/run_{algorithm}.py --config {file}"
    first = " Decide what is named above, then look" if done.needs_decision else " Look"
    return (
        f"\nwrote {file}.{first} at the plan, and try it with a tiny model on a CPU:\n"
        f"{command} --dry-run\n{command} recipes/tiny={algorithm}"
    )


def _header(file: Path, done: Migration) -> str:
    lost = account(fate for fate in done.fates if fate.kind in ("absent", "unknown"))
    lines = [f"From {file.name} of NeMo-RL."]
    lines += ["Written out, as defaults differ:", *done.added] if done.added else []
    lines += ["Left out:", *lost] if lost else []
    return "".join(f"# {line}\n" for line in lines)


def _account(done: Migration) -> str:
    """How many keys had which fate, and those that are left out, one by one."""
    counts = {kind: [f for f in done.fates if f.kind == kind] for kind in _MEANING}
    lines = [f"{len(done.fates)} keys:"]
    lines += [f"  {len(some):4} {kind}: {_MEANING[kind]}" for kind, some in counts.items() if some]
    lines += ["", *(f"added: {line}" for line in done.added)] if done.added else []
    for kind in LEFT_OUT:
        lines += [""] if counts[kind] else []
        lines += [f"{kind}: {line}" for line in account(counts[kind])]
    return "\n".join(lines)


_MEANING = {
    "kept": "the same key here",
    "said differently": "another name or form here",
    "off": "a feature that is absent here, and off there",
    "ignored": "tunes what does not exist here",
    "absent": "no counterpart; the value is lost",
    "unknown": "no such key here, or no such value",
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
