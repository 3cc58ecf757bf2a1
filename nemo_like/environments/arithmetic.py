"""Judges answers to the bundled arithmetic problems."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nemo_like.interfaces import Environment
from nemo_like.types import Rollout

_ANSWER = re.compile(r"Answer: ?(-?[0-9]{1,18})(?![0-9])")
_NUMBER = re.compile(r"-?[0-9]{1,18}")


def last_answer(text: str) -> int | None:
    """The number of the last `Answer: N`, or None."""
    found = _ANSWER.findall(text)
    return int(found[-1]) if found else None


class ArithmeticEnvironment(Environment):
    """Reward 1 where the last `Answer: N` of a rollout is the expected number, else 0.

    What is expected is a number, or a solution that ends with `Answer: N`.
    """

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One reward per rollout."""
        return [float(self._is_right(rollout)) for rollout in rollouts]

    @staticmethod
    def _is_right(rollout: Rollout) -> bool:
        gold = rollout.prompt.answer.strip()
        expected = int(gold) if _NUMBER.fullmatch(gold) else last_answer(gold)
        return expected is not None and last_answer(rollout.text) == expected
