"""A run that is interrupted and continued is the run that was not, to the bit."""

import pytest

from nemo_like.errors import EXIT_INTERRUPTED
from tests.e2e.commands import Place, contents, sft

STEPS = 5
STATE = ("model", "optimizer", "rng", "routing.json", "hf")
EVERY_STEP = (
    f"sft.max_num_steps={STEPS}", "checkpointing.save_period=1", "sft.val_period=1",
    "sft.val_at_end=true", "sft.val_batches=1", "sft.val_num_answers=4", "sft.val_max_new_tokens=4",
    "policy.scheduler.lr_warmup_iters=2", "policy.scheduler.lr_decay_style=cosine",
)  # fmt: skip
ONE_STEP_AT_A_TIME = "checkpointing.checkpoint_must_save_by=00:00:00:00"


@pytest.mark.parametrize(
    ("optimizer", "is_async"),
    [("adam", "true"), ("muon", "false")],
    ids=["AdamW, saved in the background", "Muon, saved at once"],
)
def test_a_run_interrupted_after_every_step_equals_the_uninterrupted_one(
    tmp_path, optimizer, is_async
):
    settings = (
        *EVERY_STEP,
        f"policy.optimizer.optimizer={optimizer}",
        f"checkpointing.is_async={is_async}",
    )
    straight, broken = Place(tmp_path / "straight"), Place(tmp_path / "broken")
    assert sft(straight.argv(*settings)) == 0
    for done in range(1, STEPS):
        assert sft(broken.argv(*settings, ONE_STEP_AT_A_TIME)) == EXIT_INTERRUPTED
        assert broken.steps() == list(range(1, done + 1))
    assert sft(broken.argv(*settings)) == 0

    assert straight.steps() == broken.steps() == list(range(1, STEPS + 1))
    for step in straight.steps():
        expected = contents(straight.step(step), *STATE)
        found = contents(broken.step(step), *STATE)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == [], f"step {step}"
    assert broken.values() == straight.values()
    assert [line["step"] for line in straight.values()] == list(range(1, STEPS + 1))
    assert len({line["train/loss"] for line in straight.values()}) == STEPS
