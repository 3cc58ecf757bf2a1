"""What the command lines of all tools have in common: how wrong input is told, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from nemo_like.errors import ConfigError, NemoLikeError


class Parser(argparse.ArgumentParser):
    """Shows a description as it is written, and says what is wrong in one line."""

    def __init__(self, *args, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(*args, formatter_class=formatter_class, **options)

    def error(self, message: str) -> NoReturn:
        """End with that line, and with the exit code of a wrong configuration."""
        self.exit(ConfigError.exit_code, f"{self.prog}: {message} (see --help)\n")


def run(
    parser: Parser, argv: Sequence[str], command: Callable[[argparse.Namespace], int] | None = None
) -> int:
    """The exit code of a command line; without `command`, that of the sub-command it names."""
    options = parser.parse_args(argv)
    try:
        return int((command or options.command)(options))
    except NemoLikeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a file of the user's that is not there, or may not be written
        reason = f"{error.filename}: {(error.strerror or '').lower()}" if error.filename else error
        print(f"{parser.prog}: {reason}", file=sys.stderr)
        return ConfigError.exit_code
