"""Whatever ends a run, the same command continues it from the last good checkpoint."""

import os
import re
import signal
import subprocess
import time

import pytest

from nemo_like.checkpoint.layout import draft_folder
from nemo_like.errors import EXIT_INTERRUPTED
from nemo_like.run.journal import REPEAT_S
from tests.e2e.commands import Place, contents, sft, start_fork, wait_until, words

STEPS = 8
SETTINGS = (
    f"sft.max_num_steps={STEPS}",
    "checkpointing.save_period=2",
    "policy.scheduler.lr_warmup_iters=2",
)
LONG = ("sft.max_num_steps=400", "sft.max_num_epochs=100", "checkpointing.save_period=1000")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run that nothing happened to."""
    place = Place(tmp_path_factory.mktemp("uninterrupted"))
    assert sft(place.argv(*SETTINGS)) == 0
    return place


def assert_same_end(place, expected):
    assert place.values() == expected.values()
    parts = ("model", "optimizer", "hf")
    assert contents(place.step(STEPS), *parts) == contents(expected.step(STEPS), *parts)


MOMENTS = {
    "the folder is there": lambda draft: draft.exists(),
    "the export is written": lambda draft: (draft / "hf" / "config.json").exists(),
    "the model is written": lambda draft: (draft / "model" / ".metadata").exists(),
    "the random numbers are written": lambda draft: (draft / "rng" / "rank_0.json").exists(),
    "only the name is missing": lambda draft: (draft / "manifest.json").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in_the_middle_of_a_save_it_continues_with_the_same_numbers(
    place, uninterrupted, moment
):
    draft = draft_folder(place.checkpoints, 4)
    process = start_fork(place.argv(*SETTINGS), place.root / "output")
    try:
        reached = MOMENTS[moment]
        wait_until(lambda: reached(draft) or place.step(4).exists(), every_s=0.0005)
        process.kill()
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL, (place.root / "output").read_text()
    assert place.steps() in ([2], [2, 4]), "the save that was killed counts as whole"
    assert sft(place.argv(*SETTINGS)) == 0
    assert place.steps() == [2, 4, 6, 8]
    assert_same_end(place, uninterrupted)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name
)
def test_a_signal_finishes_the_step_saves_and_the_same_command_continues(place, number, capsys):
    process = start_fork(place.argv(*LONG), place.root / "output")
    try:
        wait_until(lambda: len(place.logged()) >= 2)
        os.kill(process.pid, number)
        process.join(timeout=60)
    finally:
        process.kill()
        process.join()
    said = words((place.root / "output").read_text())
    assert process.exitcode == EXIT_INTERRUPTED, said
    (saved,) = place.steps()
    assert f"stopped by {number.name} at step {saved} of 400" in said
    assert [line["step"] for line in place.logged()] == list(range(1, saved + 1))
    again = place.argv(*LONG, "checkpointing.checkpoint_must_save_by=00:00:00:00")
    assert sft(again) == EXIT_INTERRUPTED
    assert place.steps() == [saved, saved + 1]
    assert f"continuing from {place.step(saved)}" in capsys.readouterr().out


def test_a_second_interrupt_ends_it_at_once_and_leaves_nothing_half(place):
    process = start_fork(
        place.argv(*LONG, "policy.train_global_batch_size=2048"), place.root / "output"
    )
    try:
        wait_until(lambda: len(place.logged()) >= 1)
        os.kill(process.pid, signal.SIGINT)
        time.sleep(REPEAT_S + 0.1)  # sooner it would count as the same one, and a step takes longer
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=60)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == EXIT_INTERRUPTED
    assert "a signal, without saving" in words((place.root / "output").read_text())
    assert place.steps() == []
    assert sft(place.argv(*SETTINGS, "policy.train_global_batch_size=128")) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_while_starting_ends_it_and_the_same_command_starts_again(place, number):
    process = start_fork(place.argv(*SETTINGS), place.root / "output")
    try:
        wait_until(lambda: "reading" in said_by(place), every_s=0.001)
        os.kill(process.pid, number)
        process.join(timeout=60)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == EXIT_INTERRUPTED, said_by(place)
    assert "a signal, without saving" in said_by(place) and "Traceback" not in said_by(place)
    assert sft(place.argv(*SETTINGS)) == 0


def said_by(place):
    output = place.root / "output"
    return words(output.read_text()) if output.exists() else ""


def test_the_time_limit_saves_and_ends_the_run(place, capsys):
    began = time.monotonic()
    limited = place.argv(*LONG, "checkpointing.checkpoint_must_save_by=00:00:00:03")
    assert sft(limited) == EXIT_INTERRUPTED
    assert 3 <= time.monotonic() - began < 30
    assert "stopped by checkpointing.checkpoint_must_save_by" in words(capsys.readouterr().out)
    assert len(place.steps()) == 1


def test_a_damaged_newest_checkpoint_is_named_with_the_good_one_and_a_command_that_works(
    place, uninterrupted, capsys
):
    assert sft(place.argv(*SETTINGS)) == 0
    shard = place.step(8) / "model" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert sft(place.argv(*SETTINGS)) == 4
    said = words(capsys.readouterr().out)
    assert f"checkpoint {place.step(8)} is damaged: model/__0_0.distcp" in said
    assert f"last good checkpoint {place.step(6)}" in said
    command = re.search(r"to continue from it: (mv \S+ \S+), then run again", said)
    subprocess.run(command[1].split(), check=True)
    assert sft(place.argv(*SETTINGS)) == 0
    assert "continuing from" in capsys.readouterr().out
    assert_same_end(place, uninterrupted)
