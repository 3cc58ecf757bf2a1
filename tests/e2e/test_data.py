"""A user's own rows by one command: trained on when they are good, reported together when not."""

import json
import random
import subprocess
import sys

import pytest

from nemo_like.errors import EXIT_INTERRUPTED
from tests.e2e.commands import REPOSITORY, SCRIPT, Place, sft, words

SHORT = (
    "sft.max_num_steps=3", "policy.scheduler.lr_warmup_iters=1", "sft.val_at_start=true",
    "sft.val_batches=1", "sft.val_global_batch_size=8",
)  # fmt: skip


def school_problem(rng):
    """A word problem with its worked answer, in the form of grade-school data sets."""
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    who = rng.choice(["Ada", "Bo", "Chen", "Dora"])
    return {
        "question": f"{who} has {a} apples and buys {b} more. How many apples does {who} have now?",
        "answer": f"{who} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}",
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    rng, folder = random.Random(5), tmp_path_factory.mktemp("school")
    write(folder / "train.jsonl", [school_problem(rng) for _ in range(60)])
    write(folder / "test.jsonl", [school_problem(rng) for _ in range(10)])
    return folder


def question_and_answer(folder):
    return tuple(
        f"data.{name}.{key}"
        for name, file in (("train", "train"), ("validation", "test"))
        for key in (
            f"data_path={folder / file}.jsonl", "input_key=question", "output_key=answer",
            "num_rows=null",
        )
    )  # fmt: skip


def test_rows_of_questions_and_answers_are_trained_on(place, school):
    assert sft(place.argv(*SHORT, *question_and_answer(school))) == 0
    assert len(place.losses()) == 3
    first = place.values()[0]
    assert first["step"] == 0 and 5 < first["validation/val_loss"] < 8


def test_answers_to_them_are_judged_by_the_named_environment(place, school):
    answers = ("sft.val_num_answers=4", "sft.val_max_new_tokens=4", "data.default.env_name=math",
               "data.validation.env_name=math", "sft.val_at_end=true")  # fmt: skip
    assert sft(place.argv(*SHORT, *question_and_answer(school), *answers)) == 0
    assert 0 <= place.values()[-1]["validation/accuracy"] <= 1
    samples = [json.loads(x) for x in (place.log / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and all("####" in s["expected"] for s in samples)


def conversation(rng):
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return {
        "messages": [
            {"role": "system", "content": "Answer with a number."},
            {"role": "user", "content": f"{a}+{b}?"},
            {"role": "assistant", "content": f"{a + b}"},
            {"role": "user", "content": "And one more?"},
            {"role": "assistant", "content": f"{a + b + 1}"},
        ]
    }


def test_conversations_are_trained_on_with_a_share_held_out(place, tmp_path):
    rng = random.Random(6)
    file = write(tmp_path / "chats.jsonl", [conversation(rng) for _ in range(60)])
    settings = (
        f"data.train.data_path={file}", "data.train.messages_key=messages", "data.validation=null",
        "data.train.num_rows=null", "data.train.split_validation_size=0.2",
    )  # fmt: skip
    assert sft(place.argv(*SHORT, *settings)) == 0
    assert len(place.losses()) == 3 and "validation/val_loss" in place.values()[0]


def test_other_rows_in_the_same_checkpoint_folder_are_refused(place, school, capsys):
    once = (*SHORT, "checkpointing.checkpoint_must_save_by=00:00:00:00")
    assert sft(place.argv(*once)) == EXIT_INTERRUPTED
    assert sft(place.argv(*SHORT, *question_and_answer(school))) == 4
    said = words(capsys.readouterr().out)
    assert "the data are not those of the checkpoint" in said
    assert "checkpointing.checkpoint_dir" in said


BAD_LINES = {
    7: ('{"question": "2+2?", "answer": ', "not JSON (1) {}:7,"),
    9: ('{"question": "2+2?"}', "missing column (1) {}:9, field `answer`"),
    12: ('{"question": "2+2?", "answer": null}', "null (1) {}:12, field `answer`"),
    20: (json.dumps({"question": "long?", "answer": "9" * 3000}), "too long (1) {}:20,"),
}


def test_bad_rows_are_reported_together_before_anything_is_trained(place, school, capsys):
    lines = (school / "train.jsonl").read_text().splitlines()
    for number, (line, _) in BAD_LINES.items():
        lines[number - 1] = line
    bad = place.root / "bad.jsonl"
    bad.write_text("\n".join(lines) + "\n")
    settings = (*SHORT, *question_and_answer(school), f"data.train.data_path={bad}")
    assert sft(place.argv(*settings)) == 3
    said = words(capsys.readouterr().out)
    for _, report in BAD_LINES.values():
        assert report.format(bad) in said
    assert "4 of 70 rows" in said and "data.bad_rows=drop" in said
    assert place.logged() == [] and place.steps() == []

    dropped = (*settings, "data.bad_rows=drop", "data.max_bad_rows=0.1")
    assert sft(place.argv(*dropped)) == 0
    assert "4 of 70 rows" in words(capsys.readouterr().out)


def test_a_misspelt_key_costs_a_second_and_no_heavy_import(tmp_path):
    """The command as it is typed; `-X importtime` names every module that is imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT, "sft.max_num_step=5"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert any("did you mean sft.max_num_steps?" in line for line in said), said
    imported = {
        line.split("|")[-1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "pydantic" in imported
    assert not imported & {"torch", "ray", "transformers", "vllm", "datasets", "numpy"}


def test_the_same_command_in_two_places_gives_the_same_numbers(tmp_path, school):
    places = [Place(tmp_path / name) for name in ("one", "two")]
    for one in places:
        one.root.mkdir()
        assert sft(one.argv(*SHORT, *question_and_answer(school))) == 0
    assert places[0].values() == places[1].values()
