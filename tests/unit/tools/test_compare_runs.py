"""Several runs on one page, and what is refused."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_like.observability.run_folder import RunFolder
from nemo_like.observability.sinks import JsonlSink

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools/compare_runs.py"))
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Exit code, output and errors of a command line that is typed beside `logs/`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*argv: str) -> tuple[int, str, str]:
        code = TOOL["main"](argv)
        return code, *capsys.readouterr()

    return command


def log(name: str, losses: dict[int, float], *, seconds: float = 2.0, **settings: float) -> None:
    """What a run leaves in `logs/`; step 0 is a validation before training."""
    folder = RunFolder(Path("logs") / name)
    folder.path.mkdir(parents=True)
    sink = JsonlSink(folder.metrics)
    sink.log(0, {"validation/val_loss": 9.0})
    for step, loss in losses.items():
        sink.log(step, {"train/loss": loss, "train/new": loss, "performance/wall_s": seconds})
    folder.write_config({"sft": {"seed": 1}, "policy": {"optimizer": settings}})


def test_the_page_shows_what_runs_came_to_and_where_they_were_set_differently(run):
    log("exp_001", {1: 3.0, 2: 1.0, 3: 2.0}, lr=0.1, decay=0.0)
    log("exp_002", {1: 4.0, 2: 2.5}, lr=0.2, decay=0.0)
    code, out, _ = run("logs/exp_001", "logs/exp_002")
    assert code == 0 and "wrote comparison.html\nwrote comparison.png\n" in out
    page = Path("comparison.html").read_text()
    for text in (page, out):
        assert "best 1.0000 at step 2" in text and "best 2.5000 at step 2" in text
        assert "policy.optimizer.lr" in text and "decay" not in text and "seed" not in text
    assert page.count("<svg") == 2, "loss and held-out loss; the rest is not among the first"
    assert not re.search(r"(src|href)=.?http", page) and "<script" not in page
    assert Path("comparison.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_are_chosen_by_pattern_in_the_order_of_the_patterns(run):
    log("a", {1: 1.0})
    code, _, _ = run("logs/a", "--metrics", "train/*", "validation/*", "--out", "some.html")
    titles = re.findall("<h3>(.*?)</h3>", Path("some.html").read_text())
    assert (code, titles) == (0, ["train/loss", "train/new", "validation/val_loss"])


def test_a_picture_as_svg_is_the_same_every_time(run):
    log("a", {1: 1.0, 2: 0.5})
    assert run("logs/a", "--out", "one.svg", "two.svg")[0] == 0
    assert Path("one.svg").read_bytes() == Path("two.svg").read_bytes()


def test_lines_over_seconds_are_of_the_time_that_steps_took(run):
    log("slow", {1: 3.0, 2: 1.0}, seconds=10.0)
    read, draw = TOOL["read_runs"](["logs/slow"]), TOOL["comparison_of"]
    series = {name: each.series for name, each in read.items()}
    (loss, held_out) = draw(series, ["train/loss", "validation/val_loss"], across="seconds")
    assert loss.lines == {"slow": {10.0: 3.0, 20.0: 1.0}}
    assert held_out.lines == {"slow": {0.0: 9.0}}


def test_a_run_without_a_metric_leaves_the_others_their_colours(run):
    log("old", {1: 1.0})
    log("new", {1: 1.0})
    JsonlSink(Path("logs/new/metrics.jsonl")).log(1, {"train/only_new": 1.0})
    assert run("logs/old", "logs/new", "--metrics", "train/only_new", "--out", "x.html")[0] == 0
    (legend,) = re.findall('<div class="legend">(.*?)</div>', Path("x.html").read_text())
    colour = TOOL["COLOURS"][1]
    assert legend == f'<span><i style="background: {colour}"></i>new</span>'


def test_runs_of_one_name_are_told_apart_by_their_folders(run):
    for name in ("sft/exp_001", "grpo/exp_001"):
        log(name, {1: 1.0})
    read = TOOL["read_runs"]
    assert list(read(["logs/sft/exp_001", "logs/grpo/exp_001"])) == ["sft/exp_001", "grpo/exp_001"]
    assert list(read(["begun=logs/sft/exp_001", "logs/grpo/exp_001/"])) == ["begun", "grpo/exp_001"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logs/foreign"], "metrics.jsonl, line 1 is not JSON of a run (found no step in it)"),
        (["logs/nowhere"], "logs/nowhere holds no metrics.jsonl"),
        (["logs/a", "logs/a"], "two runs are called a: name them apart, as NAME=logs/a"),
        (["logs/a", "--metrics", "train/l"], "--metrics train/l: no run has it; there are"),
        (["logs/a", "--out", "x.pdf"], "--out x.pdf: expected a name that ends in .html"),
        (["logs/a", "--out", "nowhere/x.html"], "nowhere/x.html"),
    ],
)
def test_what_can_not_be_compared_is_refused_in_a_line(run, words, message):
    log("a", {1: 1.0})
    log("foreign", {1: 1.0})
    Path("logs/foreign/metrics.jsonl").write_text('{"epoch": 1}\n')
    code, _, errors = run(*words)
    assert (code in (2, 3), errors.count("\n")) == (True, 1) and message in errors
