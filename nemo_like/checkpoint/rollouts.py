"""Rollouts for later steps in a checkpoint: one JSON file for each step, exact to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nemo_like.checkpoint import layout
from nemo_like.checkpoint.files import durable_stream, read_json, refusing_os_errors
from nemo_like.errors import CheckpointError
from nemo_like.types import DrawnAhead

_ADAPTER = TypeAdapter(DrawnAhead)
# A prompt is written once, not with each of its samples.
_REPEATED: Any = {
    "groups": {"__all__": {"prompt": True, "rollouts": {"__all__": {"prompt": True}}}}
}


def write(folder: Path, pending: Sequence[DrawnAhead]) -> None:
    """Write them into a checkpoint folder; nothing happens if there are none.

    Raises:
        CheckpointError: the disk does not take them.
    """
    if not pending:
        return
    place = folder / layout.ROLLOUTS
    with refusing_os_errors(f"cannot write {place}"):
        place.mkdir()
        for one in pending:
            with durable_stream(place / f"step_{one.step}.json") as stream:
                stream.write(_ADAPTER.dump_json(one, exclude=_REPEATED))


def read(folder: Path) -> list[DrawnAhead]:
    """What `write` wrote into this checkpoint folder, by step.

    Raises:
        CheckpointError: a file that another version wrote, or nobody.
    """
    found = [_read(file) for file in (folder / layout.ROLLOUTS).glob("step_*.json")]
    return sorted(found, key=lambda one: one.step)


def _read(file: Path) -> DrawnAhead:
    raw = read_json(file)
    try:
        for prompt, group in zip(raw["prompts"], raw["groups"] or (), strict=False):
            group["prompt"] = prompt
            for rollout in group["rollouts"]:
                rollout["prompt"] = prompt
        return _ADAPTER.validate_python(raw)
    except (LookupError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{file} holds no rollouts of this version: {error}") from error
