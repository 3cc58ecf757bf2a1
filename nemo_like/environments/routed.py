"""Several environments as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from nemo_like.errors import DataError
from nemo_like.interfaces import Environment
from nemo_like.types import Rollout

T = TypeVar("T")


class RoutedEnvironment(Environment):
    """Each rollout is replied to and judged by the environment that its prompt names.

    Args:
        environments: By `Prompt.env_name`; they are this one's to close.
    """

    def __init__(self, environments: Mapping[str, Environment]):
        self._environments = dict(environments)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One reward per rollout, in order.

        Raises:
            DataError: a prompt names no environment of these, or one gives too few rewards or too
                many.
        """
        return self._routed(rollouts, "rewards", lambda judge, mine: judge.score(mine))

    def reply(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """What each rollout goes on with, in order; None where it is complete.

        Raises:
            DataError: as for `score`.
        """
        return self._routed(rollouts, "replies", lambda judge, mine: judge.reply(mine))

    def _routed(
        self,
        rollouts: Sequence[Rollout],
        what: str,
        ask: Callable[[Environment, Sequence[Rollout]], list[T]],
    ) -> list[T]:
        places: dict[str, list[int]] = {}
        for place, rollout in enumerate(rollouts):
            places.setdefault(rollout.prompt.env_name, []).append(place)
        by_place: dict[int, T] = {}
        for name, mine in places.items():
            if name not in self._environments:
                raise DataError(
                    f"the prompt {rollouts[mine[0]].prompt.text[:200]!r} has env_name={name!r}; "
                    f"this run judges with {', '.join(self._environments)}"
                )
            given = ask(self._environments[name], [rollouts[place] for place in mine])
            if len(given) != len(mine):
                raise DataError(
                    f"the environment {name} gave {len(given)} {what} for {len(mine)} rollouts"
                )
            by_place.update(zip(mine, given, strict=True))
        return [by_place[place] for place in range(len(rollouts))]

    def close(self) -> None:
        """Close them all; safe to call twice."""
        for environment in self._environments.values():
            environment.close()
