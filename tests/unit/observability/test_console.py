import io
from pathlib import Path

import pytest
from rich.console import Console

from nemo_like.errors import WorkerError
from nemo_like.observability.console import RunConsole, duration
from nemo_like.observability.records import Answer, Table


class Screen:
    """A console that writes into memory, and a clock that moves by hand."""

    def __init__(self, *, is_terminal=False, width=100):
        self.file = io.StringIO()
        self.time = 0.0
        console = Console(
            file=self.file,
            force_terminal=is_terminal,
            width=width,
            highlight=False,
            color_system=None,
        )
        self.console = RunConsole(console, now=lambda: self.time)

    @property
    def text(self):
        return self.file.getvalue()


VALUES = {
    "train/loss": 1.25,
    "train/lr": 1e-3,
    "performance/tokens_per_s": 12345.6,
    "performance/eta_s": 187,
    "timing/train": 0.5,
}


def test_without_a_terminal_there_is_a_plain_line_every_few_seconds_and_the_last():
    screen = Screen()
    screen.console.start(100)
    for step in range(1, 101):
        screen.time += 1
        screen.console.log(step, VALUES)
    lines = screen.text.splitlines()
    assert [line.split()[1] for line in lines] == [f"{s}/100" for s in range(1, 100, 5)] + [
        "100/100"
    ]
    assert lines[0] == "step 1/100  loss 1.2500  lr 1.00e-03  tokens/s 12,346  ETA 3:07"
    assert "\x1b" not in screen.text and "\r" not in screen.text


def test_a_terminal_gets_a_bar_with_the_same_facts():
    screen = Screen(is_terminal=True)
    screen.console.start(10, done=4)
    screen.console.log(5, VALUES)
    screen.console.close()
    screen.console.close()
    assert "step 5/10" in screen.text
    for fact in ("loss 1.2500", "tokens/s 12,346", "ETA 3:07"):
        assert fact in screen.text


@pytest.mark.parametrize("is_terminal", [False, True])
def test_every_validation_is_told(is_terminal):
    screen = Screen(is_terminal=is_terminal)
    screen.console.start(10)
    for step in (0, 1):
        screen.console.log(step, {"validation/val_loss": 2.5, "validation/accuracy": 0.43})
    screen.console.close()
    for step in (0, 1):
        assert f"validation at step {step}  val_loss 2.5  accuracy 0.43" in screen.text


def test_what_a_model_says_is_neither_markup_nor_a_terminal_command_nor_a_secret():
    screen = Screen()
    evil = "[bold]x[/] [/nothing] \x1b[2J\x07\r hf_abcdefghijklmnopqrstuv"
    screen.console.answers([Answer(3, evil, evil, evil, True), Answer(3, "q", "a " * 2000)])
    screen.console.say(evil)
    screen.console.table(Table(evil, ("a",), ((evil,),)))
    assert "[bold]x[/] [/nothing]" in screen.text
    assert not any(bad in screen.text for bad in ("\x1b", "\x07", "\r", "hf_abc"))
    assert "step 3 · right" in screen.text
    assert screen.text.count("a a a") < 500  # a long answer is shortened


def test_tables_show_every_row_with_numbers_to_the_right():
    screen = Screen()
    rows = (("muon", "1,234"), ("adamw", "5"))
    screen.console.table(Table("Who owns what", ("optimizer", "parameters"), rows))
    lines = [line.rstrip() for line in screen.text.splitlines()]
    assert lines[0] == "Who owns what"
    assert any(line.endswith("1,234") for line in lines)
    assert any(line.endswith("    5") for line in lines)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_summary_ends_with_places_and_a_command_in_one_piece(is_terminal):
    screen = Screen(is_terminal=is_terminal, width=60)
    command = (
        "uv run examples/run_sft.py policy.optimizer.optimizer=muon " + "sft.seed=1 " * 9 + "x=1"
    )
    screen.console.start(10)
    screen.console.summary(
        {"held-out loss": "0.41 (from 2.31)"},
        places={"checkpoint": Path("results/sft/step_60"), "report": None},
        next_command=command,
    )
    for expected in ("Done", "0.41 (from 2.31)", "results/sft/step_60", f"Next:  {command}\n"):
        assert expected in screen.text
    assert "report" not in screen.text


@pytest.mark.parametrize("is_terminal", [False, True])
def test_an_error_names_cause_checkpoint_and_next_command(is_terminal):
    screen = Screen(is_terminal=is_terminal)
    error = WorkerError("rank 1 died in forward; token=abcdefgh")
    screen.console.error(error, last_checkpoint=Path("results/step_20"), next_command="uv run x")
    for expected in ("WorkerError", "rank 1 died", "results/step_20", "Next:  uv run x\n"):
        assert expected in screen.text
    assert "abcdefgh" not in screen.text
    screen.console.error(error, last_checkpoint=None, next_command=None)
    assert "none was written" in screen.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1:00"), (187, "3:07"), (7509, "2:05:09")],
)
def test_durations_are_written_as_people_write_them(seconds, text):
    assert duration(seconds) == text
