"""The commands that the documents tell a reader to type, read off their pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "3rdparty/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
RUNNABLE = "<!-- runnable -->"
"""Stands above a block whose commands the nightly run takes as they are, one after the other."""
BLOCK = re.compile(
    rf"^({RUNNABLE}\n+)?^```(\w*)\n(.*?)^```$|^ {{4}}(uv run .*)$", re.MULTILINE | re.DOTALL
)
INLINE = re.compile(r"`(uv run [^`]*)`")
TAB = "⇥"
"""Shows where a reader presses the key, in a line that is no command yet."""
EXIT = re.compile(r"# exit (\d+)")
UV_OPTIONS_WITH_VALUE = {"--extra", "--with", "--only-group", "--group"}


@dataclass(frozen=True)
class Command:
    """One `uv run`: what it runs, its arguments, where its output goes, and how it ends."""

    page: str
    text: str
    uv_options: tuple[str, ...]
    program: str
    arguments: tuple[str, ...]
    output: str | None
    exit_code: int

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def blocks() -> Iterator[tuple[str, bool, list[Command]]]:
    """Page, whether it is marked runnable, and commands of every block that has commands."""
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            mark, language, fenced, indented = match.groups()
            is_shell = language in ("", "bash", "sh", None)
            lines = (indented or fenced).replace("\\\n", " ").splitlines() if is_shell else []
            if found := [c for line in lines if (c := _command(page.name, line))]:
                yield page.name, mark is not None, found
        for line in INLINE.findall(BLOCK.sub("", text)):
            if found := _command(page.name, line):
                yield page.name, False, [found]


def _command(page: str, line: str) -> Command | None:
    line = line.strip().removeprefix("$ ")
    if not line.startswith("uv run ") or TAB in line:
        return None
    words = shlex.split(line, comments=True)[2:]
    uv_options = []
    while words and words[0].startswith("-"):
        uv_options.append(words.pop(0))
        if uv_options[-1] in UV_OPTIONS_WITH_VALUE:
            uv_options.append(words.pop(0))
    output = words[words.index(">") + 1] if ">" in words else None
    words = words[: words.index(">")] if output else words
    ends = EXIT.search(line)
    return Command(
        page=page,
        text=re.sub(r"\s+", " ", line),
        uv_options=tuple(uv_options),
        program=words[0],
        arguments=tuple(words[1:]),
        output=output,
        exit_code=int(ends[1]) if ends else 0,
    )
