"""A run whose rollouts have several turns, with a real engine and a real policy."""

import json

from tests.e2e.commands import grpo

SETTINGS = (
    "policy.sft_config=null", "policy.init=random", "grpo.max_num_steps=2", "grpo.val_at_end=true",
    "policy.generation.max_new_tokens=12", "grpo.max_rollout_turns=3",
    "policy.generation.stop_strings=['e', '1']",  # which a newborn model writes soon
    "data.default.env_name=custom", "env.custom.memory_gb=0.5",
)  # fmt: skip
FUNCTIONS = """
def reward(prompt, answer, expected):
    return len(answer) % 3

def reply(prompt, answer, expected):
    return None if answer.count("well") == 2 else " well? "
"""


def test_engine_and_policy_agree_on_what_was_sampled_in_every_turn(place, monkeypatch):
    (place.root / "talk.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(place.root)
    monkeypatch.setenv("PYTHONPATH", str(place.root))
    functions = ("env.custom.reward=talk:reward", "env.custom.reply=talk:reply")
    assert grpo(place.grpo_argv(*SETTINGS, *functions)) == 0
    steps = [line for line in place.logged() if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert 1 < line["train/avg_turns_per_sample"] <= 3
        assert 1 <= line["train/token_mult_prob_error"] < 1.0001
        assert line["train/grad_norm"] > 0
    assert 1 < place.logged()[-1]["validation/turns"] <= 3
    answers = [json.loads(line) for line in (place.log / "samples.jsonl").read_text().splitlines()]
    assert any(" \u00abwell?\u00bb " in answer["answer"] for answer in answers)
