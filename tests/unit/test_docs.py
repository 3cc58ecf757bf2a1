"""The documents speak of what exists, and the import table is the one that is held."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from nemo_like.backends.base import RankBackend
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.schema import is_known, known_paths
from nemo_like.config.sft import SFTTree
from tools.docs_site import HOLE, OUTSIDE, link_on_site, messages

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / "3rdparty").glob("*.md")]
)
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)

LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
NAMED_FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|md|jsonl|toml))`")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
FOLDERS = (ROOT, ROOT / "nemo_like")


@each_document
def test_every_local_link_leads_somewhere(document):
    targets = [t for t in LINK.findall(document.read_text()) if "://" not in t]
    assert [t for t in targets if not (document.parent / t).exists()] == []


@each_document
def test_every_file_that_is_named_exists(document):
    named = NAMED_FILE.findall(document.read_text())
    assert [n for n in named if not any((folder / n).exists() for folder in FOLDERS)] == []


@each_document
def test_what_is_said_to_be_in_a_file_is_in_it(document):
    said = re.findall(r"`(\w+)` (?:in|of) `((?:\w+/)*\w+\.py)`", document.read_text())
    files = {path: next(f / path for f in FOLDERS if (f / path).exists()) for _, path in said}
    gone = [(name, path) for name, path in said if name not in files[path].read_text()]
    assert gone == []


@each_document
def test_the_python_on_the_page_runs(document, monkeypatch):
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # a dataclass looks its module up
    for number, block in enumerate(PYTHON.findall(document.read_text()), start=1):
        code = compile(block, f"{document.name}, block {number}", "exec", dont_inherit=True)
        exec(code, vars(page))


@pytest.mark.parametrize("name", ["sft", "grpo", "dapo"])
def test_the_document_of_an_algorithm_holds_its_page_as_it_runs(name):
    page = (ROOT / f"nemo_like/algorithms/{name}.py").read_text()
    blocks = PYTHON.findall((ROOT / f"docs/{name}.md").read_text())
    assert blocks == [page], f"copy the page into docs/{name}.md again"


def test_the_import_table_of_the_documentation_is_the_one_that_is_held():
    held = runpy.run_path(str(Path(__file__).with_name("test_layers.py")))
    written = {}
    table = (ROOT / "docs/architecture.md").read_text().split("| Part | may import |")[1]
    for row in table.split("\n\n")[0].splitlines()[2:]:
        parts, allowed = (cell.strip() for cell in row.strip("|").split("|"))
        names = held["EVERYTHING"] if allowed == "everything" else set(re.findall(r"\w+", allowed))
        written |= dict.fromkeys(re.findall(r"\w+", parts), names)
    may_import = held["MAY_IMPORT"]
    assert written == {part: may_import[part] for part in may_import if part in written}
    assert set(may_import) - set(written) == {"", "__main__"}


def test_what_a_backend_has_to_write_is_what_the_page_says():
    table = (ROOT / "docs/extending.md").read_text().split("| Method | What it owes |")[1]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == RankBackend.__abstractmethods__


def pages_of(nav):
    """The files that a navigation leads to."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in pages_of(entry)]


def test_every_page_is_in_the_navigation_of_the_site():
    listed = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    brought = {name for name in OUTSIDE if name.endswith(".md")} | {"messages.md"}
    written = {p.name for p in (ROOT / "docs").glob("*.md")}
    assert sorted(listed) == sorted(written | brought), "a page has its place in mkdocs.yml, nav"


def test_links_lead_to_pages_of_the_site():
    assert link_on_site("docs/muon.md", "") == "muon.md"
    assert link_on_site("../README.md", "docs") == "index.md"
    assert link_on_site("../3rdparty/README.md", "docs") == "third_party.md"
    assert link_on_site("images/curve.svg", "docs") == "images/curve.svg"
    assert link_on_site("../docs/muon.md", "3rdparty") == "muon.md"


def test_every_key_that_others_are_translated_into_exists():
    page = (ROOT / "docs/migrating.md").read_text().split("## TRL")[1]
    rows = re.findall(r"^\| .*? \| (.*?) \|", page, re.MULTILINE)
    words = [word for row in rows for quote in re.findall("`(.*?)`", row) for word in quote.split()]
    known = known_paths(SFTTree) | known_paths(GRPOTree)
    keys = {word.split("=")[0] for word in words if "." in word and "*" not in word}
    assert len(keys) > 60
    assert [key for key in sorted(keys) if not is_known(key, known)] == []


def troubles():
    """What the first columns of the page quote, each as a pattern of a message."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    tables = [table.split("\n\n")[0] for table in page.split("| The message says |")[1:]]
    rows = [row.split(" | ")[0] for table in tables for row in table.splitlines()[2:]]
    quotes = {quote for row in rows for quote in re.findall("`([^`]+)`", row)}
    return {q: re.compile(".*".join(re.escape(p.strip()) for p in q.split(HOLE))) for q in quotes}


def test_every_message_is_in_troubleshooting():
    # Rules between keys say all there is to say; those for rows are on the page of the data.
    ends = [m for m in messages() if m.kind not in ("Conflict", "RowError")]
    patterns = troubles().values()
    missing = [f"{m.place}: {m.text}" for m in ends if not any(p.search(m.text) for p in patterns)]
    assert missing == [], "say why and what to do in docs/troubleshooting.md, in a row of its kin"


def test_troubleshooting_quotes_messages_that_there_are():
    said = [m.text for m in messages()]
    # Some are put together from parts: then the part is somewhere in the source.
    sources = [p for folder in ("nemo_like", "tools") for p in (ROOT / folder).rglob("*.py")]
    texts = [re.sub(r'"\s+f?"', "", p.read_text()) for p in sources]
    gone = [q for q, p in troubles().items() if not any(p.search(text) for text in said + texts)]
    vague = [q for q in troubles() if sum(c.isalpha() for c in q) < 7]
    assert (gone, vague) == ([], [])


def test_every_rule_for_rows_is_on_the_page_of_the_data():
    page = " ".join((ROOT / "docs/data.md").read_text().split())
    assert [m.text for m in messages() if m.kind == "RowError" and m.text not in page] == []


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a git checkout"
)
def test_no_tracked_file_names_a_package_index_or_a_machine():
    judges = ("test_docs.py", "test_pins.py")
    secrets_of_place = r"(pypi\.org|/simple/?[\"' ]|extra-index-url|find-links|/root/|/home/\w)"
    found = subprocess.run(
        [
            "git",
            "grep",
            "-nIE",
            secrets_of_place,
            "--",
            ".",
            *(f":!tests/unit/{n}" for n in judges),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode in (0, 1), found.stderr
    assert found.stdout == ""
