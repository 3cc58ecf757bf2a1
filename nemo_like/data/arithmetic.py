"""The bundled problems: chains of additions and subtractions, seeded.

Half of the solutions work one step per line, half answer at once. A small model learns to work and
can not learn to answer at once, so after fine-tuning it is right about as often as it picks the
first style: a start from which reinforcement learning visibly teaches it to show its work.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nemo_like.errors import DataError

Split = Literal["train", "validation"]

MAX_PROBLEMS = {"train": 100_000, "validation": 5_000}
_NUM_OPERATORS = (2, 3, 3, 4)  # how hard a problem is, drawn with these frequencies
_MAX_TOTAL = 30
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """A chain such as `7+5-3=?`, its solution in one of two styles, and the right number."""

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


def is_held_out(prompt: str) -> bool:
    """True for the tenth of all problems that training never sees, whatever the seed."""
    return zlib.crc32(prompt.encode()) % _HELD_OUT_ONE_IN == 0


def generate_problems(num: int, *, seed: int, split: Split) -> list[Problem]:
    """`num` different problems of a split; those of `train` and `validation` never meet.

    Raises:
        DataError: for more than `MAX_PROBLEMS`: there are not many more.
    """
    if num > MAX_PROBLEMS[split]:
        raise DataError(
            f"num_rows={num} arithmetic problems of split={split}, at most {MAX_PROBLEMS[split]}"
        )
    wanted: Callable[[str], bool] = (
        is_held_out if split == "validation" else lambda prompt: not is_held_out(prompt)
    )
    rng = random.Random(f"arithmetic {split} {seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < num:
        problem = _solve(_chain(rng), works=rng.random() < 0.5)
        if wanted(problem.prompt):
            problems.setdefault(problem.prompt, problem)
    return list(problems.values())
