"""The names inside a checkpoint folder, and what a folder of checkpoints holds.

<checkpoint_dir>/
  step_20/                 a whole checkpoint: it gets this name last, once all is on disk
    manifest.json          size and checksum of every other file, and what wrote them
    config.yaml            the resolved configuration
    state.json             step, metrics, the model's identity
    routing.json           which optimizer owns which parameter
    data.json              position in the data
    model/ optimizer/      torch.distributed.checkpoint
    rng/rank_0.json ...    random number generators, one file per rank
    rollouts/step_21.json  rollouts that were drawn ahead for later steps, if any
    hf/                    weights that `transformers` loads (if asked for)
  tmp_step_30/             a save that is running, or that was killed
  .lock                    held by the run that writes here
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
STATE = "state.json"
ROUTING = "routing.json"
DATA = "data.json"
MODEL = "model"
OPTIMIZER = "optimizer"
RNG = "rng"
ROLLOUTS = "rollouts"
HF = "hf"
LOCK = ".lock"

_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
_DRAFT = re.compile(r"tmp_(pruned_)?step_(0|[1-9][0-9]*)")


def step_folder(root: Path, step: int) -> Path:
    """The folder of this step's checkpoint."""
    return root / f"step_{step}"


def draft_folder(root: Path, step: int) -> Path:
    """Where this step's checkpoint is written before it is whole."""
    return root / f"tmp_step_{step}"


def pruned_folder(root: Path, step: int) -> Path:
    """The name of a checkpoint while it is deleted: half of one is never taken for a whole one."""
    return root / f"tmp_pruned_step_{step}"


def find_steps(root: Path) -> list[int]:
    """The steps that have a checkpoint folder here, oldest first; none where there is no folder."""
    return sorted(int(match[1]) for match in _matching_folders(root, _STEP))


def find_leftovers(root: Path) -> list[Path]:
    """Folders of saves and deletions that did not end."""
    return sorted(root / match[0] for match in _matching_folders(root, _DRAFT))


def _matching_folders(root: Path, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    if not root.is_dir():
        return []
    matches = (pattern.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return [match for match in matches if match]
