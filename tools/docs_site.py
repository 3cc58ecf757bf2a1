"""What mkdocs asks while it builds the site: pages that are not in docs/, and links between them.

A file of the repository that is read on its own (README.md) stays where it is found, and the page
of all messages is read off the source, so no text stands in two places.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "third_party.md": "3rdparty/README.md",
    "LICENSE": "LICENSE",
}
"""Files of the site that are not in docs/, by their name there."""
LINK = re.compile(r"(?<=\]\()[^)#\s:]+(?=[)#])")
CODE = re.compile(r"`[^`\n]+`")


def on_files(files: Any, *, config: Any) -> Any:
    """The files of docs/, those from outside, and the page of all messages."""
    from mkdocs.structure.files import File  # in the group `docs` alone; tests read this file too

    contents = {name: (ROOT / source).read_text() for name, source in OUTSIDE.items()}
    for name, content in (contents | {"messages.md": messages_page()}).items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with links as they are on the site, where all pages lie in one folder.

    A bar in code, which GitHub wants escaped in a table, is itself here.
    """
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = CODE.sub(lambda code: code[0].replace("\\|", "|"), markdown)
    return LINK.sub(lambda link: link_on_site(link[0], posixpath.dirname(source)), markdown)


def link_on_site(target: str, folder: str) -> str:
    """Where a link leads on the site that leads to `target` from a `folder` of the repository."""
    path = posixpath.normpath(posixpath.join(folder, target))
    names = {source: name for name, source in OUTSIDE.items()}
    return names.get(path, path.removeprefix("docs/"))


HOLE = "…"
"""What a message fills in."""
RULES = {"Conflict": "Rules between keys (ConfigError)", "RowError": "Rules for rows (DataError)"}
"""Classes of which a run reports all that it finds together."""


@dataclass(frozen=True)
class Message:
    """What a run may say and then end: the class that is raised, the text, and where.

    A rule between keys has those that are known here, as the block that they are in names them.
    """

    kind: str
    text: str
    place: str
    keys: tuple[str, ...] = ()


def messages() -> Iterator[Message]:
    """Every message of the package, in the order of its source."""
    errors = ast.parse((ROOT / "nemo_like/errors.py").read_text()).body
    kinds = {node.name for node in errors if isinstance(node, ast.ClassDef)}
    kinds |= RULES.keys()
    for path in sorted((ROOT / "nemo_like").rglob("*.py")):
        module = ast.parse(path.read_text())
        for node in ast.walk(module):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in kinds and node.args):
                continue
            kind = ast.unparse(node.func)
            *keys, said = node.args[:2] if kind == "Conflict" else node.args[:1]
            text = " ".join(_text(said).split())
            if re.search(r"\w", text):  # else it was put together elsewhere
                named = [_text(key) for them in keys for key in getattr(them, "elts", [])]
                known = tuple(n.replace(f" {HOLE} ", ".") for n in named if re.search(r"\w", n))
                yield Message(kind, text, str(path.relative_to(ROOT)), known)


def _text(node: ast.AST) -> str:
    """The texts below a node, one after the other, with holes for what is not known here."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.FormattedValue):
        return HOLE
    parts = [_text(child) for child in ast.iter_child_nodes(node)]
    if not isinstance(node, ast.JoinedStr):
        return f" {HOLE} ".join(part for part in parts if re.search(r"\w", part))
    return "".join(parts)


def messages_page() -> str:
    """Markdown of all of them, by class, as they stand in the source."""
    lines = [
        "# Every message",
        "",
        f"Read off the source: what a run may end with, `{HOLE}` being what it fills in. Causes "
        "and cures are in [Troubleshooting](troubleshooting.md).",
    ]
    for kind, some in groupby(sorted(messages(), key=lambda m: m.kind), key=lambda m: m.kind):
        lines += ["", f"## {RULES.get(kind, kind)}", ""]
        for one in dict.fromkeys(some):
            keys = ", ".join(f"`{key}`" for key in one.keys)
            lines.append(f"- {keys}{': ' if keys else ''}{_plain(one.text)} `{one.place}`")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return re.sub(r"([*_`<\[\]])", r"\\\1", text)
