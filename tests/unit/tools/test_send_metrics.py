"""What a run wrote reaches trackers later with its steps and times, and only once."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

from nemo_like.config.run import LoggerConfig
from nemo_like.observability.run_folder import RunFolder
from nemo_like.observability.sinks import JsonlSink

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools/send_metrics.py"))
TENSORBOARD = "logger.tensorboard_enabled=true"
WANDB = ("logger.wandb_enabled=true", "logger.wandb.mode=offline")


@pytest.fixture
def logged(tmp_path) -> RunFolder:
    """A run of three steps, ten seconds each, that was logged to W&B's name only."""
    folder = RunFolder(tmp_path / "exp_001")
    folder.path.mkdir()
    for step, loss in ((1, 3.0), (2, math.nan), (3, 1.0)):
        JsonlSink(folder.metrics, now=lambda at=step: 1e9 + 10 * at).log(step, {"train/loss": loss})
    logger = LoggerConfig.model_validate({"wandb_enabled": True, "wandb": {"project": "theirs"}})
    folder.write_config({"sft": {"seed": 7}, "logger": logger.model_dump(mode="json")})
    return folder


def test_tensorboard_gets_every_value_with_its_step_and_time_and_only_once(logged, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert TOOL["main"]([str(logged.path), TENSORBOARD]) == 0
    assert not (logged.path / "wandb_id").exists(), "what the run had on is not sent again"
    events = EventAccumulator(str(logged.path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(e.step, e.wall_time) for e in events] == [(s, 1e9 + 10 * s) for s in (1, 2, 3)]
    assert events[0].value == 3.0 and math.isnan(events[1].value)
    assert TOOL["main"]([str(logged.path), TENSORBOARD]) == 2
    assert "is there already, as " in capsys.readouterr().err
    assert len(list((logged.path / "tensorboard").iterdir())) == 1


def test_wandb_gets_them_offline_with_the_settings_of_the_run(logged):
    assert TOOL["main"]([str(logged.path), *WANDB]) == 0
    (file,) = logged.path.glob("wandb/offline-run-*/run-*.wandb")
    stored = file.read_bytes()  # W&B's own records, in which names and values are text
    assert b"theirs" in stored and b'"seed":7' in stored.replace(b" ", b"")
    assert all(f"1.0000000{step}e+09".encode() in stored for step in (1, 2, 3)), "the times"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nowhere to send to: add logger.tensorboard_enabled=true or"),
        (["logger.tensorbord_enabled=true"], "did you mean logger.tensorboard_enabled?"),
        (["sft.seed=1", TENSORBOARD], "there is no such key"),
        (["logger.wandb.mode=of", TENSORBOARD], "expected online | offline"),
        (["nowhere", TENSORBOARD], "nowhere holds no metrics.jsonl"),
    ],
)
def test_what_can_not_be_sent_is_refused_before_anything_is(logged, capsys, words, message):
    assert TOOL["main"]([str(logged.path), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (logged.path / "tensorboard").exists()
