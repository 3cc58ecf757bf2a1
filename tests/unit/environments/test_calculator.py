import warnings

import pytest

from nemo_like.environments.calculator import CalculatorEnvironment, calculated
from nemo_like.types import Prompt, Reply, Rollout


def rollout(text, *, replied=0):
    """A rollout with this text, whose first `replied` characters were there before."""
    replies = (Reply((0, 1), (0, replied)),) if replied else ()
    return Rollout(Prompt(0, (1,), "", "84"), (1, 2), (0.0,) * 2, text, "stop", 0, replies)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", 84),
        (" 3 + 4 * 5 ", 23),
        ("(3+4)*5", 35),
        ("3-10", -7),
        ("-(2-5)", 3),
        ("91/7", 13),
        ("999999999*999999999", 999999998000000001),
    ],
)
def test_the_calculator_knows_its_arithmetic(expression, value):
    assert calculated(expression) == value


NO_VALUE = [
    "", "1+", "7/2", "7/0", "2**9", "7//2", "1e3", "1.5", "0x1f", "1_000", "True", "a", "[1]",
    "3(4)", "__import__('os')", "(lambda: 1)()", "10 if 1 else 2", "1;2", "1\n", "\u0661+1",
    "9" * 20, "9" * 5000, "1+" * 5000 + "1", "(" * 64, "-" * 64, "9" * 18 + "*" + "9" * 18,
]  # fmt: skip


@pytest.mark.parametrize("expression", NO_VALUE, ids=lambda text: text[:12])
def test_what_is_no_sum_of_its_kind_has_no_value(expression):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calculated(expression) is None


def test_it_replies_to_a_call_at_the_end_and_to_nothing_else():
    before = "<calc>12*7</calc>84\n"
    said = [
        rollout("<calc>12*7</calc>"),
        rollout(f"{before}<calc>84+1</calc>", replied=len(before)),
        rollout("<calc>12*</calc>"),
        rollout(f"{before}Answer: 84", replied=len(before)),  # what it was told is no call
        rollout("<calc>12*7</calc> is <b>"),
        rollout("<calc>12*7"),
        rollout("Answer: 84"),
        rollout(""),
    ]
    expected = ["84\n", "85\n", "error\n", None, None, None, None, None]
    assert CalculatorEnvironment().reply(said) == expected


def test_its_reward_is_for_the_last_answer():
    texts = ["<calc>12*7</calc>84\nAnswer: 84", "<calc>12*7</calc>84\n", "Answer: 85"]
    assert CalculatorEnvironment().score([rollout(text) for text in texts]) == [1.0, 0.0, 0.0]
