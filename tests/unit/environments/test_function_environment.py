import os
import signal
import subprocess
import sys
import time

import pytest

from nemo_like.config.environments import RewardWorkersConfig
from nemo_like.environments import reward_worker
from nemo_like.environments.function import FunctionEnvironment
from nemo_like.errors import ConfigError, DataError, WorkerError
from nemo_like.types import Prompt, Rollout

REWARDS = '''
import os
import subprocess
import sys
import time

def misbehave(prompt, answer, expected):
    """Does what the answer says."""
    print("chatter")
    print("chatter", file=sys.stderr)
    if "sleep" in answer:
        time.sleep(60)
    if "orphan" in answer:
        with open(expected, "w") as file:
            file.write(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)
    if "raise" in answer:
        raise ValueError("too strange")
    if "exit" in answer:
        os._exit(7)
    if "memory" in answer:
        bytearray(1 << 30)
    if "read" in answer:
        return len(sys.stdin.read())
    if "fork" in answer and os.fork() == 0:
        os.setsid()
        time.sleep(4)
        os._exit(0)
    if "fork" in answer:
        time.sleep(60)
    values = {"nan": float("nan"), "inf": float("inf"), "none": None, "list": [1.0], "true": True}
    return values[answer] if answer in values else float(answer == expected)

def hint(prompt, answer, expected):
    """What the answer asks for, in a text where there is something to say."""
    if "twice" in answer:
        return None
    misbehave(prompt, answer, expected)
    return 7 if answer == "number" else f"not {answer}"

def of_two(prompt, answer):
    return 1.0

with open("imports", "a") as file:
    file.write("x")
'''


def rollout(text, expected="yes", prompt="say yes"):
    return Rollout(Prompt(0, (1,), prompt, expected), (1,), (0.0,), text, "stop", 0)


def limits(num_workers=1, timeout_s=5.0, memory_gb=0.5):
    return RewardWorkersConfig(num_workers=num_workers, timeout_s=timeout_s, memory_gb=memory_gb)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "strange.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(folder):
    """Environments that are closed at the end; `make.said` is what they said."""
    made = []

    def make(reward="strange:misbehave", *, failure_reward=None, reply=None, **costs):
        made.append(
            FunctionEnvironment(
                reward,
                limits(**costs),
                key="env.custom",
                failure_reward=failure_reward,
                say=make.said.append,
                reply=reply,
            )
        )
        return made[-1]

    make.said = []
    yield make
    for environment in made:
        environment.close()


def test_rewards_are_in_the_order_of_the_rollouts_whatever_the_processes(make):
    environment = make(num_workers=2)
    assert environment.score([rollout(text) for text in ("yes", "no") * 10]) == [1.0, 0.0] * 10
    assert environment.score([rollout("true"), rollout("read")]) == [1.0, 0.0]
    assert environment.score([]) == []
    assert make.said == []


FAILURES = [
    ("raise", r"raised ValueError: too strange \(strange.py:18\)"),
    ("exit", r"took its process along \(exit status 7\)"),
    ("memory", r"raised MemoryError"),
    ("nan", "returned nan, expected one finite number"),
    ("inf", "returned inf, expected one finite number"),
    ("none", "returned None, expected one finite number"),
    ("list", r"returned \[1.0\], expected one finite number"),
]


@pytest.mark.parametrize(("answer", "what"), FAILURES)
def test_a_failed_reward_ends_the_run_with_its_sample(make, answer, what):
    environment = make()
    with pytest.raises(DataError, match=rf"strange:misbehave {what}.*'{answer}'.*'say yes'.*score"):
        environment.score([rollout("yes"), rollout(answer), rollout("no")])
    assert environment.score([rollout("yes")]) == [1.0]


def test_failed_rewards_are_replaced_and_told_of_once(make):
    environment = make(failure_reward=-0.5)
    answers = ["yes", *(answer for answer, _ in FAILURES), "yes"]
    rewards = environment.score([rollout(answer) for answer in answers])
    assert rewards == [1.0] + [-0.5] * len(FAILURES) + [1.0]
    assert len(make.said) == 1
    assert make.said[0].startswith("7 of 9 rewards failed, and are -0.5 instead. The first: ")
    assert "too strange" in make.said[0]


def test_a_reward_that_hangs_costs_its_limit_and_the_others_nothing(make):
    environment = make(failure_reward=0.0, timeout_s=0.3)
    start = time.monotonic()
    rewards = environment.score([rollout("yes"), rollout("sleep"), rollout("yes")])
    assert rewards == [1.0, 0.0, 1.0]
    assert time.monotonic() - start < 5
    assert "took more than 0.3 s" in make.said[0]


def test_what_a_hanging_reward_leaves_behind_with_its_pipe_is_not_waited_for(make):
    environment = make(failure_reward=0.0, timeout_s=0.3)
    start = time.monotonic()
    assert environment.score([rollout("fork")]) == [0.0]
    assert time.monotonic() - start < 3


def test_a_process_that_takes_no_sample_costs_its_limit(make):
    environment = make(failure_reward=0.0, timeout_s=0.3)
    os.kill(environment._processes[0]._process.pid, signal.SIGSTOP)
    prompt = "more than a pipe holds" * 10_000
    assert environment.score([rollout("yes", prompt=prompt), rollout("yes")]) == [0.0, 1.0]


def test_what_a_hanging_reward_started_ends_with_it(make, folder):
    environment = make(failure_reward=0.0, timeout_s=0.5)
    environment.score([rollout("orphan", str(folder / "pid"))])
    assert has_ended(int((folder / "pid").read_text()))


def has_ended(pid, within_s=5.0):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().split()[2] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_the_report_shows_the_beginnings_of_prompt_and_answer(make):
    environment = make()
    with pytest.raises(DataError) as error:
        environment.score([rollout("raise" + "a" * 300, prompt="p" * 300)])
    assert "'raise" + "a" * 195 + "'" in str(error.value)
    assert "'" + "p" * 200 + "'" in str(error.value)


def test_after_a_failure_that_ends_the_run_no_more_rewards_are_asked_for(make):
    environment = make(timeout_s=0.3)
    start = time.monotonic()
    with pytest.raises(DataError):
        environment.score([rollout("sleep")] * 100)
    assert time.monotonic() - start < 5


def test_a_process_that_died_between_two_answers_costs_neither(make, folder):
    environment = make()
    assert environment.score([rollout("yes")]) == [1.0]
    environment._processes[0]._process.kill()
    environment._processes[0]._process.wait()
    assert environment.score([rollout("yes")]) == [1.0]
    assert (folder / "imports").read_text() == "xx"


def test_a_process_that_does_not_start_again_ends_the_run(make, folder):
    environment = make(failure_reward=0.0)
    (folder / "strange.py").write_text("raise OSError('gone')")
    with pytest.raises(WorkerError, match="strange:misbehave.*OSError: gone"):
        environment.score([rollout("exit"), rollout("yes")])


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        ("absent:f", "No module named 'absent'"),
        ("strange:absent", "has no attribute 'absent'"),
        ("strange:of_two", "too many positional arguments"),
        ("strange:REWARDS", "attribute"),
        ("strange:sys", "callable"),
    ],
)
def test_what_can_not_be_a_reward_is_refused_at_once(make, reward, what):
    with pytest.raises(ConfigError, match=f"env.custom: {reward} can not be a reward: .*{what}"):
        make(reward)


def test_a_process_whose_run_is_gone_ends_even_in_the_middle_of_a_reward(folder):
    arguments = ['{"reward": "strange:misbehave"}', "0.2", str(1 << 29), "{}"]
    process = subprocess.Popen(
        [sys.executable, "-m", reward_worker.__name__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    process.stdin.write(b'["reward", "", "sleep", ""]\n')
    process.stdin.close()
    assert process.wait(timeout=10) != 0


def test_a_closed_environment_has_no_processes(make):
    environment = make()
    pid = environment._processes[0]._process.pid
    os.kill(pid, 0)
    environment.close()
    environment.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_replies_come_from_the_same_processes_and_keep_to_the_same_limits(make):
    environment = make(reply="strange:hint", failure_reward=0.5, timeout_s=0.3)
    answers = ["no", "twice", "sleep", "raise", "exit", "number", "maybe"]
    replies = environment.reply([rollout(answer) for answer in answers])
    assert replies == ["not no", None, None, None, None, None, "not maybe"]
    (told,) = make.said
    assert told.startswith("4 of 7 replies failed, and those rollouts end without them. The ")
    assert "strange:hint took more than 0.3 s, for the answer 'sleep' to the prompt" in told
    assert environment.score([rollout("yes")]) == [1.0]


@pytest.mark.parametrize(
    ("answer", "what"),
    [("raise", "raised ValueError"), ("number", "returned 7, expected a text or None")],
)
def test_a_failed_reply_ends_the_run_with_its_sample(make, answer, what):
    environment = make(reply="strange:hint")
    with pytest.raises(DataError, match=rf"strange:hint {what}.*'{answer}'.*without the reply"):
        environment.reply([rollout("no"), rollout(answer)])


def test_without_a_function_for_replies_there_are_none(make):
    assert make().reply([rollout("no")]) == [None]


def test_what_can_not_be_a_reply_is_refused_at_once(make):
    with pytest.raises(ConfigError, match="strange:absent can not be a reply: .*no attribute"):
        make(reply="strange:absent")
