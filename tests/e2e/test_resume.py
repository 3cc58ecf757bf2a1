"""A run that is interrupted and continued is the run that was not, to the bit."""

import pytest

from tests.e2e.commands import continues_exactly, sft

STEPS = 5
EVERY_STEP = (
    f"sft.max_num_steps={STEPS}", "checkpointing.save_period=1", "sft.val_period=1",
    "sft.val_at_end=true", "sft.val_batches=1", "sft.val_num_answers=4", "sft.val_max_new_tokens=4",
    "policy.scheduler.lr_warmup_iters=2", "policy.scheduler.lr_decay_style=cosine",
)  # fmt: skip


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
    straight = continues_exactly(sft, lambda place: place.argv(*settings), tmp_path, STEPS)
    assert len({line["train/loss"] for line in straight.values()}) == STEPS
