"""The command line of every entry point: parse, show or run, end with a documented exit code.

0    done
2    the configuration is wrong (nothing was started)
3    the data are wrong
4    a checkpoint is damaged, incomplete, or another run's
5    nothing to learn from
6    a worker failed or died
7    a loss or gradient is not finite (the weights were not touched)
8    engine and policy do not agree on probabilities
75   ended by a signal or a time limit: the same command continues, or starts again
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from nemo_like.config.command_line import Asked, Invocation, parse
from nemo_like.config.tree import RunTree
from nemo_like.errors import ConfigError

Tree = TypeVar("Tree", bound=RunTree)
Run = Callable[[Tree], int]
DryRun = Callable[[Tree, Asked], int]


def main(
    argv: Sequence[str],
    *,
    tree: type[Tree],
    default_config: Path,
    run: Callable[[], Run[Tree]],
    dry_run: Callable[[], DryRun[Tree]],
) -> int:
    """The exit code of a command line.

    `run` and `dry_run` import what they need when they are called.
    """
    try:
        invocation = parse(argv, tree=tree, default_config=default_config)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    for note in invocation.notes:
        sys.stderr.write(f"note: {note}\n")
    match invocation.mode:
        case "help" | "print_config":
            sys.stdout.write(invocation.output)
            return 0
        case "dry_run":
            tell = dry_run()
            return _sweep(invocation, lambda tree: tell(tree, invocation.asked))
        case "run":
            # Only before torch is imported. OpenMP threads that spin while they wait, beside any
            # busy process, cost a factor of ten.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            return _sweep(invocation, run())


def _sweep(invocation: Invocation[Tree], run: Run[Tree]) -> int:
    """Each tree in turn; the first that does not end well ends the sweep."""
    for tree in invocation.sweep:
        code = run(tree)
        if code:
            return code
    return 0
