"""The places that metrics go to. All take the same values; none is told twice about one step.

Every library is imported by the sink that needs it, when it is switched on.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_like.config.run import LoggerConfig, MlflowConfig, WandbConfig
from nemo_like.errors import ConfigError
from nemo_like.observability.run_folder import RunFolder, append_line
from nemo_like.observability.secrets import redact, redact_tree


def build_sinks(
    config: LoggerConfig,
    folder: RunFolder,
    *,
    resolved_config: Mapping[str, Any],
    resume_step: int | None = None,
) -> list[Sink]:
    """`metrics.jsonl`, and the trackers that `logger.*` switches on.

    Raises:
        ConfigError: a tracker is on whose package, login or server is missing.
    """
    trackers = build_trackers(
        config, folder, resolved_config=resolved_config, resume_step=resume_step
    )
    return [JsonlSink(folder.metrics), *trackers]


def build_trackers(
    config: LoggerConfig,
    folder: RunFolder,
    *,
    resolved_config: Mapping[str, Any],
    resume_step: int | None = None,
    now: Callable[[], float] = time.time,
) -> list[Sink]:
    """The sinks besides `metrics.jsonl` that `logger.*` switches on. They see no secrets.

    `now` gives the seconds since 1970 that they put beside values.

    Raises:
        ConfigError: one is on whose package, login or server is missing.
    """
    safe_config = redact_tree(resolved_config)
    sinks: list[Sink] = []
    if config.tensorboard_enabled:
        log_dir = tensorboard_folder(config, folder)
        sinks.append(TensorboardSink(log_dir, resume_step=resume_step, now=now))
    if config.wandb_enabled:
        sinks.append(WandbSink(config.wandb, folder.path, resolved_config=safe_config, now=now))
    if config.mlflow_enabled:
        sinks.append(MlflowSink(config.mlflow, folder.path, resolved_config=safe_config, now=now))
    return sinks


def tensorboard_folder(config: LoggerConfig, folder: RunFolder) -> Path:
    """Where a run's event files lie."""
    return Path(config.tensorboard.log_dir or folder.path / "tensorboard")


WANDB_ID, MLFLOW_ID = "wandb_id", "mlflow_id"
"""Files of a log folder that say which run of a tracker it is."""


class JsonlSink:
    """One JSON object per line: `step`, `time` (seconds since 1970) and the values by name.

    NaN and infinities are the strings `"nan"`, `"inf"` and `"-inf"`, because JSON has none.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append the values of one step."""
        plain = {k: v if math.isfinite(v) else str(float(v)) for k, v in values.items()}
        append_line(self._path, {"step": step, "time": round(self._now(), 3), **plain})

    def close(self) -> None:
        """Nothing is buffered."""


class TensorboardSink:
    """Event files for TensorBoard; steps after the resumed one are purged from the curves."""

    def __init__(
        self,
        log_dir: Path,
        *,
        resume_step: int | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step)
        self._now = now

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=self._now())

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; its id lies in the log folder, so a resumed run is the same run.

    Steps that a resumed run does again are ignored by W&B, which takes each step once; they are
    equal.
    """

    def __init__(
        self,
        config: WandbConfig,
        folder: Path,
        *,
        resolved_config: Mapping[str, Any],
        now: Callable[[], float] = time.time,
    ) -> None:
        import wandb

        self._now = now
        # W&B's own metadata would hold the command line as it was typed, and code and console
        # output as they are: a secret would travel. The run folder has all of them, redacted.
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True
        )
        try:
            self._run = wandb.init(
                project=config.project,
                name=config.name,
                mode=config.mode,
                id=_kept_id(folder / WANDB_ID, lambda: uuid.uuid4().hex),
                resume="allow",
                dir=str(folder),
                config=dict(resolved_config),
                settings=settings,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logger.wandb_enabled is true, but W&B did not start: {redact(str(error))} "
                "Log in (`uv run wandb login`, or set WANDB_API_KEY), or set "
                "logger.wandb.mode=offline or logger.wandb_enabled=false"
            ) from error

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add the values; those of a step that is open already join it."""
        self._run.log({**values, "_timestamp": self._now()}, step=step)

    def close(self) -> None:
        """Upload or write what is left, and end the run."""
        self._run.finish()


class MlflowSink:
    """An MLflow run; its id lies in the log folder, so a resumed run is the same run."""

    def __init__(
        self,
        config: MlflowConfig,
        folder: Path,
        *,
        resolved_config: Mapping[str, Any],
        now: Callable[[], float] = time.time,
    ) -> None:
        try:
            import mlflow
        except ModuleNotFoundError as error:
            raise ConfigError(
                "logger.mlflow_enabled is true, but the package mlflow is not installed: run "
                "`uv sync --inexact --extra mlflow`, or set logger.mlflow_enabled=false"
            ) from error

        self._now = now
        self._entities = mlflow.entities
        try:
            self._client = mlflow.MlflowClient(_tracking_uri(config, folder))
            self._run_id = _kept_id(
                folder / MLFLOW_ID, lambda: self._new_run(config, folder, resolved_config)
            )
            self._client.update_run(self._run_id, status="RUNNING")
        except mlflow.MlflowException as error:
            raise ConfigError(
                f"logger.mlflow_enabled is true, but MLflow did not start: {redact(str(error))} "
                "Check logger.mlflow.tracking_uri, or set logger.mlflow_enabled=false"
            ) from error

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the values in one request."""
        now_ms = int(self._now() * 1000)
        metrics = [self._entities.Metric(k, v, now_ms, step) for k, v in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)

    def _new_run(
        self, config: MlflowConfig, folder: Path, resolved_config: Mapping[str, Any]
    ) -> str:
        experiment = self._client.get_experiment_by_name(config.experiment_name)
        experiment_id = (
            self._client.create_experiment(
                config.experiment_name, artifact_location=_artifact_location(config, folder)
            )
            if experiment is None
            else experiment.experiment_id
        )
        run_name = config.run_name or folder.name
        run_id: str = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        self._client.log_dict(run_id, dict(resolved_config), "config.yaml")
        return run_id


Sink = JsonlSink | TensorboardSink | WandbSink | MlflowSink


def _tracking_uri(config: MlflowConfig, folder: Path) -> str:
    if config.tracking_uri is not None:
        return config.tracking_uri
    database = (folder / "mlflow").resolve()
    database.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{database}/mlflow.db"  # MLflow gave up plain folders


def _artifact_location(config: MlflowConfig, folder: Path) -> str | None:
    """Where files go; a server knows, but a bare database would take the current folder."""
    return None if config.tracking_uri else (folder / "mlflow" / "files").resolve().as_uri()


def _kept_id(path: Path, make: Callable[[], str]) -> str:
    """The id that this log folder's run has, made at the first call."""
    if not path.exists():
        path.write_text(make())
    return path.read_text()
