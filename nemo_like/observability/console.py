"""What a run says on the terminal; the only importer of rich.

On a terminal there is a progress bar; elsewhere (a file, a pipe, a batch job) plain lines every few
seconds. Everything is redacted, and text of the model is shown as text: no markup, no control
characters.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table as RichTable
from rich.text import Text

from nemo_like.errors import ConfigError, DataError, NemoLikeError
from nemo_like.observability.headlines import HEADLINES
from nemo_like.observability.records import Answer, Table, is_number
from nemo_like.observability.secrets import redact

PLAIN_LINE_EVERY_S = 5.0
_PLAIN_WIDTH = 110
_ANSWER_CHARACTERS = 800
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class RunConsole:
    """The terminal of a run, and one of its metric sinks.

    Values named `train/...` move the bar, values named `validation/...` make a line of their own.
    """

    def __init__(
        self, console: Console | None = None, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(highlight=False)
        if console is None and not self._console.is_terminal:
            self._console.width = _PLAIN_WIDTH
        self._now = now
        self._last_line_at = -float("inf")
        self._total_steps = 0
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, total_steps: int, *, done: int = 0) -> None:
        """Show the bar, which a resumed run begins at `done` steps."""
        self._total_steps = total_steps
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            refresh_per_second=2,  # a redraw costs CPU that belongs to the training
        )
        self._task = self._progress.add_task("", total=total_steps, completed=done, status="")
        self._progress.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show a training step on the bar or, now and then, as a line; a validation always."""
        validation = {k: v for k, v in values.items() if k.startswith("validation/")}
        if validation:
            self._validation(step, validation)
        if not any(k.startswith("train/") for k in values):
            return
        shown = [
            f"{h.label} {h.form.format(values[h.metric])}"
            for h in HEADLINES
            if h.metric in values and h.metric not in validation
        ]
        if "performance/eta_s" in values:
            shown.append(f"ETA {duration(values['performance/eta_s'])}")
        if self._progress is not None:
            self._progress.update(self._task, completed=step, status="  ".join(shown))
        else:
            self._plain_step(step, "  ".join(shown))

    def say(self, text: str) -> None:
        """One line of text."""
        self._console.print(_text(text), soft_wrap=True)

    def table(self, table: Table) -> None:
        """A table, with numbers to the right."""
        rich_table = RichTable(title=_text(table.title), box=box.SIMPLE_HEAD, title_justify="left")
        for index, column in enumerate(table.columns):
            to_the_right = all(is_number(row[index]) for row in table.rows)
            side: Literal["left", "right"] = "right" if to_the_right else "left"
            rich_table.add_column(_text(column), justify=side, overflow="fold")
        for row in table.rows:
            rich_table.add_row(*map(_text, row))
        self._console.print(rich_table)

    def answers(self, answers: Iterable[Answer]) -> None:
        """What the model said to held-out prompts."""
        for answer in answers:
            mark, style = _MARKS[answer.is_correct]
            parts = {"prompt": answer.prompt, "answer": answer.answer, "expected": answer.expected}
            grid = _grid({k: _shortened(v.strip()) for k, v in parts.items() if v})
            title = f"step {answer.step}{mark}"
            self._console.print(Panel(grid, title=title, title_align="left", border_style=style))

    def summary(
        self,
        results: Mapping[str, str],
        *,
        places: Mapping[str, Path | None],
        next_command: str | None,
        title: str = "Done",
    ) -> None:
        """The end of a run: what came out, where it lies, and what to type next."""
        self.close()
        grid = _grid({**results, **{k: str(p) for k, p in places.items() if p is not None}})
        style = "green" if title == "Done" else "yellow"
        self._ending(title, style, body=grid, next_command=next_command)

    def error(
        self, error: NemoLikeError, *, last_checkpoint: Path | None, next_command: str | None
    ) -> None:
        """The end of a run that cannot go on: the cause, the last good checkpoint, what to type."""
        self.close()
        body: RenderableType = _text(str(error))
        if last_checkpoint or not isinstance(error, ConfigError | DataError):
            place = str(last_checkpoint or "none was written")
            body = Group(body, Text(), _grid({"last good checkpoint": place}))
        self._ending(type(error).__name__, "red", body=body, next_command=next_command)

    def close(self) -> None:
        """Take the bar away and leave its last state; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _validation(self, step: int, values: Mapping[str, float]) -> None:
        shown = "  ".join(f"{k.removeprefix('validation/')} {v:.4g}" for k, v in values.items())
        line = Text.assemble((f"validation at step {step}  ", "bold cyan"), _text(shown))
        self._console.print(line, soft_wrap=True)

    def _plain_step(self, step: int, shown: str) -> None:
        is_due = self._now() - self._last_line_at >= PLAIN_LINE_EVERY_S
        if is_due or step >= self._total_steps:
            self._last_line_at = self._now()
            self.say(f"step {step}/{self._total_steps}  {shown}")

    def _ending(
        self, title: str, style: str, *, body: RenderableType, next_command: str | None
    ) -> None:
        if self._console.is_terminal:
            self._console.print(
                Panel(body, title=title, title_align="left", border_style=style, padding=(1, 2))
            )
        else:
            self._console.print(Text(f"\n--- {title} ---"))
            self._console.print(body, soft_wrap=True)
        if next_command is not None:
            # Outside the frame and in one piece, so that it can be copied.
            following = Text.assemble(("Next:  ", "bold"), _text(next_command))
            self._console.print(following, soft_wrap=True)


_MARKS: dict[bool | None, tuple[str, str]] = {
    True: (" · right", "green"),
    False: (" · wrong", "red"),
    None: ("", "dim"),
}


def duration(seconds: float) -> str:
    """Seconds as people write them: `42 s`, `3:07`, `2:05:09`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _grid(entries: Mapping[str, str]) -> RichTable:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in entries.items():
        grid.add_row(_text(name), _text(value))
    return grid


def _shortened(text: str) -> str:
    return text if len(text) <= _ANSWER_CHARACTERS else text[:_ANSWER_CHARACTERS] + " ..."


def _text(text: str) -> Text:
    """Text as it is: without secrets, and without what a terminal would take as a command."""
    return Text(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", redact(text)))
