"""Problems as text: what was found and where, what is allowed, and the nearest spelling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

from nemo_like.config.compat import MOVED
from nemo_like.config.draft import Draft, Problem, show
from nemo_like.config.schema import Key

HINT = (
    "Every key with its default: examples/run_sft.py --help, examples/run_grpo.py --help "
    "(one block: --help policy)."
)


STOPPED = "in the configuration; nothing was started"


def divisors(number: int) -> str:
    """What divides a number, for a message that says which sizes are possible."""
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)


def report(problems: Sequence[Problem], draft: Draft | None = None, *, head: str = STOPPED) -> str:
    """Every problem, each with its keys, values and origins, once, below their number."""
    several = "problems" if len(problems) > 1 else "problem"
    texts = dict.fromkeys(_paragraph(problem, draft) for problem in problems)
    return "\n\n".join([f"{len(texts)} {several} {head}.", *texts, HINT])


def _paragraph(problem: Problem, draft: Draft | None) -> str:
    lines = [_key_line(key, problem, draft) for key in problem.keys]
    if not problem.keys and problem.origin is not None:
        lines = [f"  {problem.origin.text}"]
    return "\n".join([*lines, *(f"      {line}" for line in problem.message.split("\n"))])


def _key_line(key: str, problem: Problem, draft: Draft | None) -> str:
    if draft is None:
        return f"  {key}"
    if problem.origin is not None:
        shown = f"{key} = {problem.found}" if problem.found else key
        return f"  {shown:<50}  [{problem.origin.text}]"
    found, value, origin = draft.seen(key)
    shown = f"{key} = {show(value)}" if found else key
    return f"  {shown:<50}  [{origin.text}]"


def unknown_key(path: str, known: dict[str, Key]) -> str:
    """The message for a key that does not exist, with the nearest ones."""
    guesses = nearest_keys(path, known)
    if not guesses:
        return "there is no such key"
    return f"there is no such key; did you mean {' or '.join(guesses)}?"


def nearest_keys(path: str, known: dict[str, Key]) -> list[str]:
    """The keys most like this one, by name first and place second, or where it has moved to."""
    plain = ".".join(part for part in path.split(".") if not part.isdigit())
    if plain in MOVED:
        return [MOVED[plain]] if MOVED[plain] in known else []
    scores = {key: _likeness(plain, key) for key in known}
    best = max(scores.values())
    return [key for key, score in scores.items() if score > max(0.5, best - 0.001)][:2]


def _likeness(path: str, key: str) -> float:
    (place, _, name), (known_place, _, known_name) = path.rpartition("."), key.rpartition(".")
    by_name = SequenceMatcher(None, name, known_name).ratio()
    if len(name) > 2 and name in known_name:
        by_name = max(by_name, 0.75)
    if by_name < 0.6:
        return 0.0
    same_place = SequenceMatcher(None, place, known_place).ratio() if place or known_place else 1.0
    exact = 0.1 if name == known_name else 0.0
    return 0.65 * by_name + 0.35 * same_place + exact - 0.06 * key.count(".")


def wrong_value(value: Any, key: Key) -> str:
    """The message for a value of the wrong type or range."""
    if key.section:
        return f"this is a section; its keys are {key.path}.<name>"
    expected = f"expected {key.type}"
    choices = key.type.split(" | ")
    if isinstance(value, str) and len(choices) > 1:
        guess = nearest_choice(value, choices)
        return f"{expected}; did you mean {guess}?" if guess else expected
    if key.type.startswith("str") and isinstance(value, int | float):
        return f"{expected}; if this is meant as text, put it in quotes: '\"{show(value)}\"'"
    return expected


def nearest_choice(value: str, choices: Iterable[str]) -> str | None:
    """The choice most like this text, if one is."""
    scores = {c: SequenceMatcher(None, value.lower(), c.lower()).ratio() for c in choices}
    best = max(scores, key=lambda choice: scores[choice], default=None)
    return best if best is not None and scores[best] > 0.5 else None
