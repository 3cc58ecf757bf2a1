import pytest

from nemo_like.environments.arithmetic import ArithmeticEnvironment
from nemo_like.types import Prompt, Rollout


def rollout(gold: str, text: str) -> Rollout:
    return Rollout(Prompt(0, (1,), "", gold), (1,), (0.0,), text, "stop", 0)


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("17", "Answer: 17", 1.0),
        ("17", "7+5=12\n12+5=17\nAnswer: 17", 1.0),
        ("7+5=12\n12+5=17\nAnswer: 17", "Answer: 17", 1.0),
        ("-3", "Answer: -3", 1.0),
        ("3", "Answer: -3", 0.0),
        ("17", "Answer: 17\nAnswer: 18", 0.0),
        ("17", "Answer: 18\nAnswer: 17", 1.0),
        ("17", "Answer: 170", 0.0),
        ("17", "Answer: 017", 1.0),
        ("17", "17", 0.0),
        ("17", "", 0.0),
        ("17", "Answer: ", 0.0),
        ("17", "Answer: " + "9" * 10_000, 0.0),
        ("17", "Answer: ١٧", 0.0),
        ("17", "Answer: 17\x00\ud800", 1.0),
        ("no number", "no number", 0.0),
    ],
)
def test_the_last_answer_decides(gold, text, reward):
    assert ArithmeticEnvironment().score([rollout(gold, text)]) == [reward]


def test_rewards_are_in_the_order_of_the_rollouts():
    rollouts = [rollout("1", "Answer: 1"), rollout("1", "Answer: 2"), rollout("3", "Answer: 3")]
    assert ArithmeticEnvironment().score(rollouts) == [1.0, 0.0, 1.0]
    assert ArithmeticEnvironment().score([]) == []
