"""The commands of tools/checkpoint.py on the checkpoints of a small run."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_like.checkpoint.checkpoints import Checkpoints
from nemo_like.config.run import CheckpointingConfig
from tests.unit.checkpoint.small_run import IDENTITY, write_step

ROOT = Path(__file__).parents[3]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, output and errors of a command line."""
    main = runpy.run_path(str(ROOT / "tools/checkpoint.py"))["main"]

    def command(*argv: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return command


def saved(root: Path, *steps: int, config_yaml: str = "seed: 1\n") -> list[Path]:
    config = CheckpointingConfig(checkpoint_dir=str(root), metric_name=None, keep_top_k=None)
    with Checkpoints(config, replace(IDENTITY, config_yaml=config_yaml)) as checkpoints:
        return [write_step(checkpoints, step, val__loss=1 / step) for step in steps]


def test_list_shows_steps_with_metrics_and_what_was_left_behind(run, tmp_path):
    saved(tmp_path, 2, 10)
    (tmp_path / "tmp_step_12").mkdir()
    code, out, _ = run("list", tmp_path)
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == ["step_2", "step_10", "tmp_step_12:"]
    assert "val:loss=0.5" in lines[0] and "kB" in lines[0]


def test_verify_names_the_damaged_file_and_goes_on(run, tmp_path):
    first, second = saved(tmp_path, 1, 2)
    assert run("verify", tmp_path)[:2] == (0, f"{first}: whole\n{second}: whole\n")
    (first / "data.json").write_text("{}")
    code, out, _ = run("verify", tmp_path)
    assert code == 4
    assert "data.json" in out.splitlines()[0] and out.splitlines()[1] == f"{second}: whole"


def test_inspect_of_a_folder_shows_its_latest(run, tmp_path):
    saved(tmp_path, 1, 3)
    code, out, _ = run("inspect", tmp_path)
    assert code == 0
    assert "step_3: whole, step 3" in out and "parameters by owner: muon=1, adamw=1" in out
    assert "  embed  [5, 8]  bfloat16" in out and "  state/w/momentum  [8, 6]  float32" in out


def test_diff_of_equal_checkpoints_says_so(run, tmp_path):
    (one,), (other,) = saved(tmp_path / "a", 1), saved(tmp_path / "b", 1)
    assert run("diff", one, other)[:2] == (0, f"{one} and {other} are equal\n")


def test_diff_names_settings_values_and_tensors(run, tmp_path):
    (one,) = saved(tmp_path / "a", 1)
    (other,) = saved(tmp_path / "b", 2, config_yaml="seed: 2\n")
    code, out, _ = run("diff", one, other)
    lines = out.splitlines()
    assert code == 1
    assert "config seed: 1 -> 2" in lines and "optimizer last_step: 1 -> 2" in lines
    assert any(line.startswith("model w: 48 of 48 values, by ") for line in lines)
    assert not any("state/embed/step" in line for line in lines)


def test_a_folder_without_checkpoints_is_refused_with_what_is_expected(run, tmp_path):
    code, _, errors = run("inspect", tmp_path)
    assert code == 4 and "expected a step_N folder" in errors
