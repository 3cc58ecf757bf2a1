import importlib.util
import json
import math
import sys

import pytest

from nemo_like.config.run import LoggerConfig
from nemo_like.errors import ConfigError
from nemo_like.observability.curves import read_series
from nemo_like.observability.run_folder import RunFolder
from nemo_like.observability.sinks import JsonlSink, build_sinks


def build(folder, resume_step=None, **switches):
    config = LoggerConfig.model_validate(switches)
    resolved = {"sft": {"seed": 1}, "env_vars": {"HF_TOKEN": "value-of-the-token"}}
    return build_sinks(config, folder, resolved_config=resolved, resume_step=resume_step)


def log_steps(sinks, steps):
    for step in steps:
        for sink in sinks:
            sink.log(step, {"train/loss": 10.0 - step})
    for sink in sinks:
        sink.close()
        sink.close()


def test_metrics_jsonl_is_always_written(tmp_path):
    folder = RunFolder.create(tmp_path)
    log_steps(build(folder), [1, 2])
    assert read_series(folder.metrics) == {"train/loss": {1: 9.0, 2: 8.0}}


def test_nan_and_infinity_are_valid_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    JsonlSink(path, now=lambda: 12.3456).log(3, values)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 3, "time": 12.346, "a": "nan", "b": "inf", "c": "-inf", "d": 1.5}
    series = read_series(path)
    assert math.isnan(series["a"][3])
    assert (series["b"][3], series["c"][3], series["d"][3]) == (math.inf, -math.inf, 1.5)


def test_a_step_told_twice_counts_once(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for value in (1.0, 2.0):
        sink.log(7, {"validation/accuracy": value})
    assert read_series(tmp_path / "metrics.jsonl") == {"validation/accuracy": {7: 2.0}}


def test_a_curve_with_a_resume_is_single_valued(tmp_path):
    folder = RunFolder.create(tmp_path)
    log_steps(build(folder), range(1, 8))
    folder = RunFolder.reopen(folder.path, step=5)
    assert max(read_series(folder.metrics)["train/loss"]) == 5
    log_steps(build(folder, resume_step=5), range(6, 10))
    assert list(read_series(folder.metrics)["train/loss"]) == list(range(1, 10))
    assert len(folder.metrics.read_text().splitlines()) == 9


def test_tensorboard_files_hold_the_values_and_a_resume_purges_later_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder.create(tmp_path)
    log_steps(build(folder, tensorboard_enabled=True), range(1, 6))
    log_steps(build(folder, resume_step=3, tensorboard_enabled=True), [4])
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 9.0),
        (2, 8.0),
        (3, 7.0),
        (4, 6.0),
    ]


def test_wandb_offline_writes_a_run_that_a_resume_continues_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_sft.py", "x.password=value-of-the-password"])
    folder = RunFolder.create(tmp_path)
    offline = {"wandb_enabled": True, "wandb": {"mode": "offline"}}
    log_steps(build(folder, **offline), [1, 2])
    log_steps(build(folder, resume_step=2, **offline), [3])
    run_id = (folder.path / "wandb_id").read_text()
    stores = list(folder.path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert stores and all(store.stat().st_size > 0 for store in stores)
    for path in folder.path.rglob("*"):
        assert not path.is_file() or b"value-of-the-" not in path.read_bytes(), path


def test_wandb_online_without_a_login_says_what_to_do(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"wandb login.*logger.wandb.mode=offline"):
        build(RunFolder.create(tmp_path), wandb_enabled=True)


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed")
def test_a_missing_mlflow_is_a_config_error_with_the_command(tmp_path):
    with pytest.raises(ConfigError, match=r"uv sync --inexact --extra mlflow"):
        build(RunFolder.create(tmp_path), mlflow_enabled=True)


def test_mlflow_continues_the_same_run_after_a_resume(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs --extra mlflow")
    folder = RunFolder.create(tmp_path)
    log_steps(build(folder, mlflow_enabled=True), [1, 2])
    log_steps(build(folder, resume_step=2, mlflow_enabled=True), [3])
    client = mlflow.MlflowClient(f"sqlite:///{folder.path}/mlflow/mlflow.db")
    run_id = (folder.path / "mlflow_id").read_text()
    history = client.get_metric_history(run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert (folder.path / "mlflow" / "files").is_dir()
