"""What to type: the command that runs now, and one that a user may want next."""

from __future__ import annotations

import shlex
import sys

from nemo_like.config.tree import RunTree


def typed() -> str:
    """The command that started this run."""
    return shlex.join(["uv", "run", *sys.argv])


def suggestion(tree: RunTree) -> str:
    """The same with Muon, in a folder of its own; after Muon, what else there is to try."""
    if tree.policy.active_optimizer.is_muon:
        is_large = tree.next_config == tree.real_config
        how = "--dry-run" if is_large else "policy.optimizer.optimizer=muon"
        return shlex.join(["uv", "run", sys.argv[0], "--config", tree.next_config, how])
    overrides = ["policy.optimizer.optimizer=muon"]
    if any("checkpointing.checkpoint_dir=" in word for word in sys.argv):
        overrides.append(f"checkpointing.checkpoint_dir={tree.checkpointing.checkpoint_dir}_muon")
    return f"{typed()} {shlex.join(overrides)}"
