"""Sends what a run wrote into its metrics.jsonl to a tracker that was not switched on then.

    uv run tools/send_metrics.py logs/exp_001 logger.tensorboard_enabled=true
    uv run tools/send_metrics.py logs/exp_* logger.wandb_enabled=true logger.wandb.project=mine
    uv run tools/send_metrics.py logs/exp_001 logger.mlflow_enabled=true

The keys are those of a run (`logger.*`), and what is not given is as in the run's own config.yaml.
Each value keeps the step and the time that it had.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo_like.config import compose
from nemo_like.config.base import Node
from nemo_like.config.layers import Files
from nemo_like.config.report import report
from nemo_like.config.run import LoggerConfig
from nemo_like.config.schema import defaults, known_paths
from nemo_like.config.validate import validate
from nemo_like.errors import ConfigError
from nemo_like.observability.run_folder import RunFolder, read_lines
from nemo_like.observability.sinks import (
    MLFLOW_ID,
    WANDB_ID,
    build_trackers,
    tensorboard_folder,
)
from tools.command_line import Parser, run

SWITCHES = ("logger.tensorboard_enabled", "logger.wandb_enabled", "logger.mlflow_enabled")


class Loggers(Node):
    """The part of a configuration that says where metrics go."""

    logger: LoggerConfig = LoggerConfig()
    """Where metrics go."""


def main(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("words", nargs="+", metavar="RUN|KEY=VALUE", help="log folders, and keys")
    return run(parser, argv, _send_all)


def _send_all(options: argparse.Namespace) -> int:
    overrides = [word for word in options.words if "=" in word and not Path(word).exists()]
    folders = [RunFolder.of_run(Path(word)) for word in options.words if word not in overrides]
    if not folders:
        raise ConfigError("no run is named; expected a log folder such as logs/exp_001")
    asked = [(folder, *_settings(folder, overrides)) for folder in folders]
    for folder, config, logger in asked:
        count = send(folder, config, logger)
        print(f"{folder.path}: sent {count} records")
    return 0


def _settings(folder: RunFolder, overrides: Sequence[str]) -> tuple[dict[str, Any], LoggerConfig]:
    """A run's configuration, and where its metrics are to go: nowhere but where it is asked for."""
    config = folder.read_config()
    off = {switch.removeprefix("logger."): False for switch in SWITCHES}
    schema = compose.Schema(known_paths(Loggers), defaults(Loggers))
    combinations, problems = compose.parse_overrides(overrides, multirun=False)
    files = Files.of({"logger": config.get("logger", {}) | off})
    draft = compose.apply(files, combinations[0].values, schema)
    draft.problems[:0] = problems
    node, found = validate(draft, Loggers, schema.known)
    if node is None:
        raise ConfigError(report(found, draft))
    logger: LoggerConfig = node.logger
    marks = {
        SWITCHES[0]: (logger.tensorboard_enabled, tensorboard_folder(logger, folder)),
        SWITCHES[1]: (logger.wandb_enabled, folder.path / WANDB_ID),
        SWITCHES[2]: (logger.mlflow_enabled, folder.path / MLFLOW_ID),
    }
    if not any(is_on for is_on, _ in marks.values()):
        raise ConfigError(f"nowhere to send to: add {' or '.join(f'{key}=true' for key in marks)}")
    for key, (is_on, mark) in marks.items():
        if is_on and mark.exists():
            raise ConfigError(
                f"{key}: {folder.path} is there already, as {mark} says; remove that to send it "
                "again"
            )
    return config, logger


def send(folder: RunFolder, config: dict[str, Any], logger: LoggerConfig) -> int:
    """The number of records that every tracker was given."""
    records = read_lines(folder.metrics)
    record: dict[str, Any] = {}
    with ExitStack() as stack:
        trackers = build_trackers(
            logger, folder, resolved_config=config, now=lambda: record["time"]
        )
        for tracker in trackers:
            stack.callback(tracker.close)
        for record in records:
            values = {k: float(v) for k, v in record.items() if k not in ("step", "time")}
            for tracker in trackers:
                tracker.log(record["step"], values)
    return len(records)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
