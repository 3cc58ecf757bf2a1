"""Where a run began, and what became of its optimizer state on the way; each checkpoint says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_like.checkpoint.checkpoints import SavedCheckpoint
from nemo_like.errors import CheckpointError
from nemo_like.observability.records import Table
from nemo_like.optim.convert import describe


class Origin:
    """The past of a run that saves below `root`, handed on from checkpoint to checkpoint."""

    def __init__(self, root: Path, start_from: str | None) -> None:
        self._root = root
        self._start_from = start_from
        self._conversions: list[list[str]] = []

    def inherit(self, saved: SavedCheckpoint, routing: Mapping[str, str]) -> None:
        """Take over the past of a checkpoint, and add what becomes of its optimizer state now.

        Raises:
            CheckpointError: it is of a run that began elsewhere than this one was asked to.
        """
        if saved.folder.parent == self._root:
            began, asked = saved.data.get("started_from"), self._start_from
            if asked not in (None, began):
                raise CheckpointError(
                    f"{saved.folder} is of a run that began {f'with {began}' if began else 'anew'},"
                    f" not with checkpointing.start_from={asked}: leave that out to continue it, "
                    "or set another checkpointing.checkpoint_dir"
                )
            self._start_from = began
        changed = describe(saved.routing, routing)
        self._conversions = saved.data.get("conversions", []) + [
            [str(saved.step), *row] for row in changed
        ]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"started_from": self._start_from, "conversions": self._conversions}

    def tables(self) -> list[Table]:
        """What became of optimizer state, if parameters ever changed their optimizer."""
        if not self._conversions:
            return []
        columns = ("after step", "optimizer", "first of them", "tensors", "kept", "starts anew")
        rows = tuple(map(tuple, self._conversions))
        return [Table("What is kept of the optimizer state", columns, rows)]
