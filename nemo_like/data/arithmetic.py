"""The bundled problems, seeded: chains of additions and subtractions, and products.

Half of the solutions of a chain work one step per line, half of those of a product call a
calculator; the others answer at once. A small model learns to work and to call, and can not learn
to answer at once, so after fine-tuning it is right about as often as it picks the first style: a
start from which reinforcement learning visibly teaches it to show its work, or to use the tool.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nemo_like.errors import DataError

Split = Literal["train", "validation"]

Kind = Literal["arithmetic", "products"]

MAX_PROBLEMS: dict[Split, int] = {"train": 100_000, "validation": 5_000}
_NUM_OPERATORS = (2, 3, 3, 4)  # how hard a problem is, drawn with these frequencies
_MAX_TOTAL = 30
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """One such as `7+5-3=?`, its solution in one of two styles, and the right number."""

    prompt: str
    response: str
    answer: int


def _chain(rng: random.Random) -> list[int]:
    """A first number and signed steps, all of one digit, whose running total stays in 0 to 30."""
    chain = [rng.randint(0, 9)]
    for _ in range(rng.choice(_NUM_OPERATORS)):
        total = sum(chain)
        choices = [s for s in range(-9, 10) if s and 0 <= total + s <= _MAX_TOTAL]
        chain.append(rng.choice(choices))
    return chain


def _solve(chain: list[int], *, works: bool) -> Problem:
    prompt = f"{chain[0]}" + "".join(f"{step:+d}" for step in chain[1:]) + "=?"
    total, lines = chain[0], []
    for step in chain[1:]:
        lines.append(f"{total}{step:+d}={total + step}\n")
        total += step
    return Problem(prompt, ("".join(lines) if works else "") + f"Answer: {total}", total)


def _sum(rng: random.Random) -> Problem:
    chain = _chain(rng)
    return _solve(chain, works=rng.random() < 0.5)


def _product(rng: random.Random) -> Problem:
    """A product of two-digit numbers, to which half of the time a third one is added."""
    first, second = rng.randint(11, 99), rng.randint(11, 99)
    value = first * second
    prompt, calls = f"{first}*{second}", f"<calc>{first}*{second}</calc>{value}\n"
    if rng.random() < 0.5:
        third = rng.randint(11, 99)
        prompt, calls = f"{prompt}+{third}", f"{calls}<calc>{value}+{third}</calc>{value + third}\n"
        value += third
    answers_at_once = rng.random() < 0.5
    return Problem(f"{prompt}=?", ("" if answers_at_once else calls) + f"Answer: {value}", value)


_DRAW: dict[Kind, Callable[[random.Random], Problem]] = {"arithmetic": _sum, "products": _product}


def is_held_out(prompt: str) -> bool:
    """True for the tenth of all problems that training never sees, whatever the seed."""
    return zlib.crc32(prompt.encode()) % _HELD_OUT_ONE_IN == 0


def generate_problems(
    num: int, *, seed: int, split: Split, kind: Kind = "arithmetic"
) -> list[Problem]:
    """`num` different problems of a split; those of `train` and `validation` never meet.

    Raises:
        DataError: for more than `MAX_PROBLEMS`: there are not many more.
    """
    if num > MAX_PROBLEMS[split]:
        raise DataError(
            f"num_rows={num} of dataset_name={kind}, split={split}: at most {MAX_PROBLEMS[split]}"
        )
    wanted: Callable[[str], bool] = (
        is_held_out if split == "validation" else lambda prompt: not is_held_out(prompt)
    )
    rng = random.Random(f"{kind} {split} {seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < num:
        problem = _DRAW[kind](rng)
        if wanted(problem.prompt):
            problems.setdefault(problem.prompt, problem)
    return list(problems.values())
