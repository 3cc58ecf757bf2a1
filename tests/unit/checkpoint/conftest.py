"""A run folder that tests open with the settings they need."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_like.checkpoint.checkpoints import Checkpoints, RunIdentity
from nemo_like.config.run import CheckpointingConfig
from tests.unit.checkpoint.small_run import IDENTITY


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test can cut the power, so none can tell; thousands of real flushes take a minute."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def open_run(tmp_path: Path) -> Callable[..., Checkpoints]:
    def open_run(identity: RunIdentity = IDENTITY, **config: Any) -> Checkpoints:
        settings = {
            "checkpoint_dir": str(tmp_path / "ckpt"),
            "metric_name": None,
            "keep_top_k": None,
        }
        return Checkpoints(CheckpointingConfig(**(settings | config)), identity)

    return open_run
