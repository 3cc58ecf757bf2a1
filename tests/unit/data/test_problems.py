import re

import pytest

from nemo_like.data.arithmetic import MAX_PROBLEMS, generate_problems
from nemo_like.environments.calculator import calculated
from nemo_like.errors import DataError

PRODUCT = re.compile(r"[1-9][0-9]\*[1-9][0-9](\+[1-9][0-9])?=\?")
CALL = re.compile(r"<calc>([0-9*+]+)</calc>([0-9]+)")
PROBLEM = re.compile(r"[0-9]([+-][1-9]){2,4}=\?")


@pytest.fixture(scope="module")
def problems():
    return generate_problems(3000, seed=42, split="train")


def value_of(prompt: str) -> int:
    return sum(int(term) for term in re.findall(r"[+-]?[0-9]", prompt))


def test_every_solution_is_right_in_every_line(problems):
    for problem in problems:
        assert PROBLEM.fullmatch(problem.prompt)
        assert problem.answer == value_of(problem.prompt)
        *steps, last = problem.response.split("\n")
        assert last == f"Answer: {problem.answer}"
        for step in steps:
            start, sign, term, result = re.fullmatch(r"(\d+)([+-])(\d)=(\d+)", step).groups()
            assert int(start) + int(sign + term) == int(result) <= 30


def test_half_of_the_solutions_work_and_half_answer_at_once(problems):
    works = [p for p in problems if "\n" in p.response]
    assert 0.45 < len(works) / len(problems) < 0.55
    assert all(p.response.count("\n") == len(re.findall(r"[+-]", p.prompt)) for p in works)


def test_difficulties_are_mixed(problems):
    sizes = [len(re.findall(r"[+-]", p.prompt)) for p in problems]
    assert {n: sizes.count(n) / len(sizes) > 0.15 for n in (2, 3, 4)} == dict.fromkeys(
        (2, 3, 4), True
    )


def test_train_and_validation_never_meet_whatever_the_seeds(problems):
    held_out = generate_problems(1000, seed=7, split="validation")
    assert not {p.prompt for p in problems} & {p.prompt for p in held_out}


def test_problems_are_all_different_and_come_from_the_seed_alone(problems):
    assert len({p.prompt for p in problems}) == len(problems)
    assert generate_problems(3000, seed=42, split="train") == problems
    assert generate_problems(3000, seed=43, split="train") != problems
    assert generate_problems(10, seed=42, split="train") == problems[:10]


def test_products_are_right_and_half_of_them_call_the_calculator_for_every_operation():
    problems = generate_problems(2000, seed=42, split="train", kind="products")
    held_out = generate_problems(500, seed=42, split="validation", kind="products")
    assert len({p.prompt for p in problems + held_out}) == 2500
    for problem in problems:
        assert PRODUCT.fullmatch(problem.prompt)
        assert problem.answer == calculated(problem.prompt.removesuffix("=?"))
        *calls, last = problem.response.split("\n")
        assert last == f"Answer: {problem.answer}"
        assert len(calls) in (0, len(re.findall(r"[*+]", problem.prompt)))
        for call in calls:
            expression, result = CALL.fullmatch(call).groups()
            assert calculated(expression) == int(result)
    assert 0.45 < sum("<calc>" in p.response for p in problems) / len(problems) < 0.55
    assert 0.4 < sum("+" in p.prompt for p in problems) / len(problems) < 0.6


@pytest.mark.parametrize("split", ["train", "validation"])
def test_more_problems_than_there_are_is_refused(split):
    with pytest.raises(DataError, match="num_rows"):
        generate_problems(MAX_PROBLEMS[split] + 1, seed=0, split=split)
