"""The study of AdamW against Muon says of its numbers what they say."""

import json

import pytest

from tools.studies import adamw_vs_muon as study

FINALS = {("adam", 1e-3): [2.0, 2.2, 2.4], ("adam", 1e-2): [1.0, 1.2, 1.1],
          ("muon", 1e-3): [1.0, 0.9, 0.8], ("muon", 1e-4): [float("nan")] * 3}  # fmt: skip


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Curves of two steps, from 3 to the final loss, as if they had been run."""
    monkeypatch.setattr(study, "RAW", tmp_path / "raw")
    (tmp_path / "raw").mkdir()
    for (optimizer, lr), finals in FINALS.items():
        for seed, final in enumerate(finals, start=1):
            file = study.raw_file("sft", optimizer, lr, seed)
            curves = {"step": [1, 10, 20], "seconds": [0.1, 1.0 * seed, 2.0 * seed]}
            record = {"optimizer": optimizer, "lr": lr, "seed": seed, **curves}
            file.write_text(json.dumps(record | {"validation/val_loss": [3.0, 1.05, final]}))
    return tmp_path


def test_the_best_rate_is_the_one_with_the_best_mean_and_a_run_that_diverged_is_not_it(kept):
    adam, muon = study.read_runs("sft")
    assert (adam.best_rate, muon.best_rate) == (1e-2, 1e-3)


def test_the_table_has_every_rate_with_the_mean_and_the_range_of_its_seeds(kept):
    rows = study.table("sft").splitlines()[2:]
    assert rows == [
        "| adam | 0.001 | 2.2 | 2 to 2.4 | 4.0 |",
        "| adam | 0.01 | **1.1** | 1 to 1.2 | 4.0 |",
        "| muon | 0.0001 | nan | nan to nan | 4.0 |",
        "| muon | 0.001 | **0.9** | 0.8 to 1 | 4.0 |",
    ]


def test_the_race_says_when_each_was_as_good_as_the_other_in_the_end(kept):
    assert study.race("sft") == (
        "adam reaches the final mean of muon never; "
        "muon reaches the final mean of adam at step 10, after 2.0 s."
    )


def test_results_stand_between_their_comments_and_pictures_are_drawn(kept):
    page = "a\n<!-- results sft -->\nold\n<!-- end -->\nb\n<!-- results grpo -->\n<!-- end -->\n"
    once = study.with_results(page, "sft")
    assert study.with_results(once, "sft") == once
    assert "old" not in once and "| adam | 0.01 | **1.1** |" in once and once.count("race") == 0
    study.draw("sft", kept / "sft.svg")
    assert "<svg" in (kept / "sft.svg").read_text()


def test_seconds_are_those_of_training_and_the_loss_is_a_mean_of_some_steps():
    records = [{"step": 0, "validation/val_loss": 5.0}]
    for step in range(1, 13):
        records.append({"step": step, "train/loss": float(step), "performance/step_s": 0.5})
    records[-1]["validation/val_loss"] = 4.0
    found = study.curves_of(records, "validation/val_loss")
    assert found["step"] == [0, 12] and found["seconds"] == [0.0, 6.0]
    assert found["validation/val_loss"] == [5.0, 4.0]
    assert found["train"] == [5.5, 11.5]
