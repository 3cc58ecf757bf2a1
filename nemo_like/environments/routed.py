"""Several environments as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nemo_like.errors import DataError
from nemo_like.interfaces import Environment
from nemo_like.types import Rollout


class RoutedEnvironment:
    """Each rollout is judged by the environment that its prompt names.

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
        places: dict[str, list[int]] = {}
        for place, rollout in enumerate(rollouts):
            places.setdefault(rollout.prompt.env_name, []).append(place)
        rewards = [0.0] * len(rollouts)
        for name, mine in places.items():
            if name not in self._environments:
                raise DataError(
                    f"the prompt {rollouts[mine[0]].prompt.text[:200]!r} has env_name={name!r}; "
                    f"this run judges with {', '.join(self._environments)}"
                )
            given = self._environments[name].score([rollouts[place] for place in mine])
            if len(given) != len(mine):
                raise DataError(
                    f"the environment {name} gave {len(given)} rewards for {len(mine)} rollouts"
                )
            for place, reward in zip(mine, given, strict=True):
                rewards[place] = reward
        return rewards

    def close(self) -> None:
        """Close them all; safe to call twice."""
        for environment in self._environments.values():
            environment.close()
