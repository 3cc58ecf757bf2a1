import pytest

from nemo_like.algorithms.sft import train, validation_loss
from nemo_like.config.sft import SFTConfig
from nemo_like.types import TrainBatch
from tests.fakes import FakeJournal, FakePolicy, FakeStream


def run(journal, **sft):
    policy, stream = FakePolicy(), FakeStream()
    train(policy, stream, lambda step: {}, journal, sft=SFTConfig(**sft), batch_size=4)
    return policy, stream


def steps_of(journal, kind):
    return [event[1] for event in journal.events if event[0] == kind]


def test_each_step_takes_one_batch_and_ends_before_the_next():
    journal = FakeJournal(last_step=3)
    policy, stream = run(journal, val_period=0)
    assert [b.token_ids_N[0].item() for b in policy.batches] == [0, 4, 8]
    assert stream.taken == 12
    assert [e for e in journal.events if e[0] != "validation"] == [
        ("train", 1, 1.0), ("end", 1),
        ("train", 2, 0.5), ("end", 2),
        ("train", 3, 0.25), ("end", 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sft", "expected"),
    [
        ({"val_period": 2}, [0, 2, 4, 5]),
        ({"val_period": 2, "val_at_start": False, "val_at_end": False}, [2, 4]),
        ({"val_period": 0}, [0, 5]),
        ({"val_period": 5}, [0, 5]),
    ],
)
def test_validation_happens_at_the_steps_that_the_config_names(sft, expected):
    journal = FakeJournal(last_step=5)
    run(journal, **sft)
    assert steps_of(journal, "validation") == expected


def test_run_that_continues_does_not_validate_at_its_start():
    journal = FakeJournal(first_step=4, last_step=5)
    run(journal, val_period=0)
    assert steps_of(journal, "validation") == [5]


def test_run_that_is_stopped_ends_with_that_step_and_does_not_stay_to_validate():
    journal = FakeJournal(last_step=9, stop_after=2)
    policy, _ = run(journal, val_period=0)
    assert len(policy.batches) == 2
    assert steps_of(journal, "validation") == [0]


def test_validation_loss_is_per_token_over_all_batches():
    batches = [TrainBatch.of(FakeStream().take(n)) for n in (1, 3)]
    assert validation_loss(FakePolicy(), batches)["val_loss"].value == pytest.approx(1.0)
