import subprocess
import sys
import time

import pytest

from nemo_like.config.environments import MathEnvConfig
from nemo_like.environments.math import MathEnvironment
from nemo_like.types import Prompt, Rollout


def rollout(gold: str, text: str) -> Rollout:
    return Rollout(Prompt(0, (1,), "", gold), (1,), (0.0,), text, "stop", 0)


def make(**settings) -> MathEnvironment:
    return MathEnvironment(MathEnvConfig(**settings), say=lambda _: None)


@pytest.fixture(scope="module")
def environment():
    environment = make()
    yield environment
    environment.close()


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "48+24 = 72\n#### 72", 1.0),
        ("#### 72", r"The answer is $\boxed{72}$.", 1.0),
        ("#### 72", "The answer is 72.", 1.0),
        ("#### 72", "#### 71", 0.0),
        ("#### 1,234", "#### 1234", 1.0),
        ("#### 72", "#### 71\nNo:\n#### $72", 1.0),
        ("#### -5", "#### -5", 1.0),
        (r"So \boxed{\frac{1}{2}}.", "#### 0.5", 1.0),
        (r"\boxed{2}", "#### 3", 0.0),
        ("0.5", r"\boxed{\frac{1}{2}}", 1.0),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", 1.0),
        ("(1,2)", r"\boxed{(1, 2)}", 1.0),
        ("(1,2)", r"\boxed{(2, 1)}", 0.0),
        ("72", "", 0.0),
        ("72", "no idea", 0.0),
        ("72", "####", 0.0),
        ("72", r"\boxed{", 0.0),
        ("72", "(" * 50_000, 0.0),
        ("72", "\x00\ud800 72 \U0001f469", 1.0),
        ("", "72", 0.0),
    ],
)
def test_equal_answers_score_one_and_everything_else_zero(environment, gold, text, reward):
    assert environment.score([rollout(gold, text)]) == [reward]


def test_an_answer_that_takes_for_ever_scores_zero_in_bounded_time():
    environment = make(timeout_s=1.0)
    assert environment.score([rollout("5", "5")]) == [1.0]
    start = time.monotonic()
    assert environment.score([rollout("5", r"\boxed{10^{10^{10^{10}}}}")]) == [0.0]
    assert time.monotonic() - start < 20
    assert environment.score([rollout("5", "5")]) == [1.0]
    environment.close()


def test_text_that_is_code_is_not_executed(environment, tmp_path):
    target = tmp_path / "pwned"
    attacks = [
        f"__import__('os').system('touch {target}')",
        rf"\boxed{{__import__('pathlib').Path('{target}').touch()}}",
        f"#### open('{target}', 'w')",
    ]
    assert environment.score([rollout("5", text) for text in attacks]) == [0.0] * 3
    assert not target.exists()


def test_dapo_compares_letter_by_letter_what_follows_the_last_answer():
    environment = make(math_verify_impl="dapo_math_verify", num_workers=2)
    texts = ["Answer: 0.5", r"Answer: \frac{1}{2}", r"\boxed{0.5}", "Answer: $0.5$"]
    assert environment.score([rollout("0.5", text) for text in texts]) == [1.0, 0.0, 0.0, 1.0]
    environment.close()


def test_to_import_the_environment_costs_no_parser():
    code = "import sys, nemo_like.environments.math; sys.exit('sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
