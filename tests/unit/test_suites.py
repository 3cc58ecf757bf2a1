"""Lists of recipes are run to their end, and judged by limits and a baseline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_like.errors import ConfigError
from tools.run_suite import (
    Result,
    final_metrics,
    judge,
    read_baseline,
    update_baseline,
    write_table,
)
from tools.suites import Limit, Line, read_suite

ROOT = Path(__file__).parents[2]
SFT, GRPO = "sft-qwen2.5-1.5b-1n8g-fsdp2", "grpo-qwen2.5-1.5b-1n8g-fsdp2"


def judged(line: Line, now: float, before: float) -> list[str]:
    """What is wrong with a final loss, of which the baseline knows another."""
    result = Result(line.name, "", metrics={"train/loss": now})
    judge(result, line, {"train/loss": before})
    return result.failures


def test_a_line_is_recipe_form_minutes_limits_and_overrides(tmp_path):
    file = tmp_path / "some.txt"
    file.write_text(
        f"# a comment\n\n{SFT} tiny 2.5 train/loss<3e-1 sft.seed=1 train/reward>-1 # x\n"
    )
    limits = (Limit("train/loss", "<", 0.3), Limit("train/reward", ">", -1.0))
    assert read_suite(file) == [Line(SFT, "tiny", 2.5, limits, ("sft.seed=1",))]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("sft-nothing tiny 1", "no recipe 'sft-nothing'"),
        (f"{SFT} small 1", "found the form 'small'"),
        (f"{SFT} tiny 1 loss", "found 'loss'"),
        (f"{SFT} tiny", "found .*expected recipe, form and minutes"),
    ],
)
def test_a_line_of_another_form_is_refused_with_its_number(tmp_path, text, wrong):
    file = tmp_path / "some.txt"
    file.write_text(f"# first\n{text}\n")
    with pytest.raises(ConfigError, match=f"line 2: {wrong}"):
        read_suite(file)


@pytest.mark.parametrize("found", [0.3, 0.4, float("nan"), None])
def test_a_metric_out_of_its_limit_is_a_failure(found):
    metrics = {} if found is None else {"train/loss": found}
    assert Limit("train/loss", "<", 0.3).failure(metrics) is not None
    assert Limit("train/loss", "<", 0.5).failure({"train/loss": 0.3}) is None


def test_a_deterministic_metric_may_drift_by_three_percent_and_no_more():
    line = Line(SFT, "tiny", 1)
    assert judged(line, 1.029, 1.0) == judged(line, 0.971, 1.0) == []
    for drifted in (1.031, 0.96, float("nan")):
        assert len(judged(line, drifted, 1.0)) == 1
    assert judged(Line(GRPO, "tiny", 1), 2.0, 1.0) == []
    assert judged(Line(SFT, "full", 1), 2.0, 1.0) == []


def test_a_metric_that_is_gone_has_drifted():
    result = Result("", "")
    judge(result, Line(SFT, "tiny", 1), {"train/loss": 1.0})
    assert len(result.failures) == 1


def test_final_metrics_are_the_last_values_and_the_median_speed(tmp_path):
    steps = [{"step": s, "train/loss": 1 / s, "performance/tokens_per_s": s * s} for s in (1, 2, 4)]
    (tmp_path / "exp_001").mkdir()
    file = tmp_path / "exp_001/metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in steps))
    found = final_metrics(tmp_path)
    assert (found["train/loss"], found["performance/tokens_per_s"]) == (0.25, 4)


def test_the_baseline_keeps_what_passed_and_what_it_knew(tmp_path):
    file = tmp_path / "baseline.json"
    file.write_text('{"old tiny": {"seconds": 1.0}}')
    good, bad = Result("good tiny", "", seconds=2.0), Result("bad tiny", "", ["exit code 6"])
    update_baseline(file, [good, bad])
    assert read_baseline(file).keys() == {"old tiny", "good tiny"}
    assert read_baseline(file)["good tiny"]["seconds"] == 2.0


def test_the_page_has_a_row_for_each_run_and_escapes_what_it_shows(tmp_path):
    metrics = {"train/loss": 0.5}
    results = [
        Result("one tiny", "run <it>", metrics=metrics, change={"train/loss": -0.05}),
        Result("two tiny", "run", ["exit code 2"]),
    ]
    write_table(results, tmp_path)
    page = (tmp_path / "table.html").read_text()
    assert "1 of 2 passed" in page and "-5.0 %" in page and "run &lt;it&gt;" in page
    assert [r["failures"] for r in json.loads((tmp_path / "table.json").read_text())] == [
        [],
        ["exit code 2"],
    ]


def test_a_run_that_fails_or_takes_too_long_does_not_stop_the_list(tmp_path):
    suite = tmp_path / "two.txt"
    suite.write_text(f"{SFT} tiny 1 sft.no_such_key=1\n{GRPO} tiny 0.001\n")
    found = subprocess.run(
        [sys.executable, "tools/run_suite.py", str(suite), "--folder", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1, found.stderr
    first, second = json.loads((tmp_path / "out/table.json").read_text())
    assert "exit code 2" in first["failures"][0]
    assert "took longer than 0.001 minutes" in second["failures"][0]
    assert "0 of 2 passed" in found.stdout


def test_a_list_that_is_not_there_or_of_which_nothing_is_asked_for_ends_with_2(tmp_path):
    for argv in (["nope.txt"], [str(ROOT / "tests/test_suites/nightly.txt"), "--only", "zzz"]):
        tool = [sys.executable, str(ROOT / "tools/run_suite.py"), *argv]
        done = subprocess.run(tool, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Errno" not in done.stderr
