"""Looks at checkpoints without a run: what there is, whether it is whole, and what differs.

    uv run tools/checkpoint.py list    results/my_run
    uv run tools/checkpoint.py verify  results/my_run            or one step_N of it
    uv run tools/checkpoint.py inspect results/my_run/step_20    or the folder: its latest
    uv run tools/checkpoint.py diff    results/a/step_20 results/b/step_20

Nothing is written. The exit code is 1 where `diff` finds a difference, and 4 for a checkpoint that
is damaged.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_like.checkpoint import layout, manifest
from nemo_like.checkpoint.files import read_json
from nemo_like.checkpoint.store import VALUES, read_tensors, stored_tensors
from nemo_like.config.draft import differing, show
from nemo_like.errors import CheckpointError
from tools.command_line import Parser, run


def main(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    return run(_parser(), argv)


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, help_line in (
        ("list", _list, "every checkpoint of a folder: step, size, metrics"),
        ("verify", _verify, "read every byte and compare it with the manifest"),
        ("inspect", _inspect, "what one checkpoint holds, and what wrote it"),
        ("diff", _diff, "the configuration, owners and tensors in which two differ"),
    ):
        command = commands.add_parser(name, help=help_line)
        command.add_argument("folder", type=Path, help="a checkpoint_dir, or a step_N in one")
        command.set_defaults(command=function)
    command.add_argument("other", type=Path, help="the other one")
    return parser


def steps_of(folder: Path) -> list[Path]:
    """The checkpoints that a path means, oldest first."""
    if (folder / layout.MANIFEST).is_file():
        return [folder]
    steps = [layout.step_folder(folder, step) for step in layout.find_steps(folder)]
    if not steps:
        raise CheckpointError(
            f"{folder} is no checkpoint and holds none: expected a step_N folder, or the "
            "checkpointing.checkpoint_dir of a run"
        )
    return steps


def _list(options: argparse.Namespace) -> int:
    for step in steps_of(options.folder):
        metrics = read_json(step / layout.STATE)["metrics"]
        size = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
        told = "  ".join(f"{name}={value:.4g}" for name, value in sorted(metrics.items()))
        print(f"{step.name:<12} {_size(size):>9}  {told}")
    for leftover in layout.find_leftovers(options.folder):
        print(f"{leftover.name}: a save or deletion that runs, or did not end")
    return 0


def _verify(options: argparse.Namespace) -> int:
    damaged = 0
    for step in steps_of(options.folder):
        try:
            manifest.verify(step)
        except CheckpointError as error:
            damaged += 1
            print(f"{step}: {error}")
        else:
            print(f"{step}: whole")
    return CheckpointError.exit_code if damaged else 0


def _inspect(options: argparse.Namespace) -> int:
    step = steps_of(options.folder)[-1]
    verified = manifest.verify(step)
    state = read_json(step / layout.STATE)
    print(f"{step}: whole, step {verified.step}")
    _print("saved by", vars(verified.layout))
    _print("packages", verified.packages)
    _print("metrics", state["metrics"])
    _print("model", state["model"])
    _print("parameters by owner", Counter(read_json(step / layout.ROUTING).values()))
    for part in (layout.MODEL, layout.OPTIMIZER):
        if (step / part).is_dir():
            print(f"{part}:")
            for name, (shape, dtype) in stored_tensors(step / part).items():
                print(f"  {name}  {list(shape)}  {str(dtype).removeprefix('torch.')}")
    return 0


def _print(title: str, values: Mapping[str, Any]) -> None:
    print(f"{title}: " + ", ".join(f"{name}={show(value)}" for name, value in values.items()))


def _diff(options: argparse.Namespace) -> int:
    first, second = (steps_of(folder)[-1] for folder in (options.folder, options.other))
    lines = [
        *_differences("config", *(config_of(step) for step in (first, second))),
        *_differences("owner", *(read_json(step / layout.ROUTING) for step in (first, second))),
    ]
    for part in (layout.MODEL, layout.OPTIMIZER):
        if (first / part).is_dir() and (second / part).is_dir():
            lines += _tensor_differences(first / part, second / part)
        elif (first / part).is_dir() != (second / part).is_dir():
            lines.append(f"{part}: only in {first if (first / part).is_dir() else second}")
    print("\n".join(lines) if lines else f"{first} and {second} are equal")
    return int(bool(lines))


def config_of(step: Path) -> dict[str, Any]:
    """The resolved configuration of the run; nothing of a checkpoint that was imported."""
    path = step / layout.CONFIG
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _differences(what: str, first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    for name, sides in differing(first, second).items():
        yield f"{what} {name}: {' -> '.join(sides)}"


def _tensor_differences(first: Path, second: Path) -> Iterator[str]:
    """One tensor after the other, whatever the layouts that saved them."""
    one, other = stored_tensors(first), stored_tensors(second)
    described = (
        {name: f"{list(shape)} {dtype}" for name, (shape, dtype) in each.items()}
        for each in (one, other)
    )
    yield from _differences(first.name, *described)
    values = (read_json(folder / VALUES) for folder in (first, second))
    yield from _differences(first.name, *values)
    alike = [name for name in one if name in other and one[name] == other[name]]
    pairs = zip(read_tensors(first, alike), read_tensors(second, alike), strict=True)
    for (name, a), (_, b) in pairs:
        if not torch.equal(a, b):
            gap = (a.double() - b.double()).abs()
            scale = a.double().abs().max().item()
            yield (
                f"{first.name} {name}: {int((a != b).sum()):,} of {a.numel():,} values, by "
                f"{gap.max().item():.3g} at most (largest value {scale:.3g})"
            )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
