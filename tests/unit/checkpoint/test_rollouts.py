"""Rollouts in a checkpoint come back to the bit."""

import json
import math

import pytest

from nemo_like.checkpoint import rollouts
from nemo_like.errors import CheckpointError
from nemo_like.types import DrawnAhead, Group, Prompt, Reply, Rollout

REPLIES = (Reply((1, 2), (0, 1)),)


def drawn(step):
    prompt = Prompt(3, (1, 2), 'a "prompt"\n\t\u2028', "\u00e9 \U0001f600", "math")
    samples = tuple(
        Rollout(prompt, (5, 6, g), (-0.1, -1e-45, -math.pi * 10**g), "5", "stop", 7, REPLIES)
        for g in range(2)
    )
    return DrawnAhead(step, step - 2, (prompt,), (Group(prompt, samples, (0.1, 1 / 3)),))


def test_rollouts_come_back_to_the_bit_in_the_order_of_steps(tmp_path):
    pending = [drawn(9), drawn(10), DrawnAhead(11, 8, drawn(11).prompts, None)]
    rollouts.write(tmp_path, pending)
    found = rollouts.read(tmp_path)
    assert found == pending and repr(found) == repr(pending)


def test_a_prompt_is_written_once_and_nothing_where_there_is_nothing(tmp_path):
    rollouts.write(tmp_path, [])
    assert list(tmp_path.iterdir()) == [] and rollouts.read(tmp_path) == []
    rollouts.write(tmp_path, [drawn(4)])
    assert (tmp_path / "rollouts" / "step_4.json").read_text().count("token_ids") == 3


def test_rollouts_of_another_version_are_refused_by_name(tmp_path):
    rollouts.write(tmp_path, [drawn(4)])
    file = tmp_path / "rollouts" / "step_4.json"
    raw = json.loads(file.read_text())
    del raw["groups"][0]["rollouts"][1]["finish_reason"]
    file.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"step_4.json holds no rollouts of this version"):
        rollouts.read(tmp_path)
