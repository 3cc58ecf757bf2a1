import pytest

from nemo_like.environments.routed import RoutedEnvironment
from nemo_like.errors import DataError
from nemo_like.types import Prompt, Rollout


def rollout(number, env_name):
    return Rollout(Prompt(number, (1,), "?", "", env_name), (1,), (0.0,), "", "stop", 0)


class Numbers:
    """The prompt's number, times a factor."""

    def __init__(self, factor):
        self.factor, self.is_closed, self.calls = factor, False, 0

    def score(self, rollouts):
        self.calls += 1
        return [self.factor * r.prompt.index for r in rollouts]

    def close(self):
        self.is_closed = True


def test_each_rollout_is_judged_by_its_own_environment_in_order():
    ones, tens = Numbers(1.0), Numbers(10.0)
    both = RoutedEnvironment({"ones": ones, "tens": tens})
    mixed = [rollout(n, "tens" if n % 3 else "ones") for n in range(7)]
    assert both.score(mixed) == [0.0, 10.0, 20.0, 3.0, 40.0, 50.0, 6.0]
    assert both.score([rollout(2, "tens")]) == [20.0]
    assert both.score([]) == []
    assert (ones.calls, tens.calls) == (1, 2)


def test_a_prompt_that_nobody_judges_is_refused_by_name():
    with pytest.raises(DataError, match="'\\?' has env_name='other'.*judges with ones"):
        RoutedEnvironment({"ones": Numbers(1.0)}).score([rollout(1, "other")])


def test_too_few_rewards_are_refused_with_the_name_of_the_environment():
    short = Numbers(1.0)
    short.score = lambda rollouts: [1.0]
    with pytest.raises(DataError, match="environment short gave 1 rewards for 2 rollouts"):
        RoutedEnvironment({"short": short}).score([rollout(1, "short"), rollout(2, "short")])


def test_closing_closes_them_all():
    environments = {"ones": Numbers(1.0), "tens": Numbers(10.0)}
    RoutedEnvironment(environments).close()
    assert all(environment.is_closed for environment in environments.values())
