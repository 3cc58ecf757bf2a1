"""A GRPO or DAPO run, from the validated configuration to the summary."""

from __future__ import annotations

from nemo_like.config.grpo import GRPOTree
from nemo_like.errors import ConfigError
from nemo_like.observability.console import RunConsole


def run_grpo(tree: GRPOTree) -> int:
    """Train as configured; the exit code."""
    error = ConfigError(
        f"{'DAPO' if tree.grpo.is_dapo else 'GRPO'}: this version plans such runs (--dry-run) and "
        "can not train them yet"
    )
    RunConsole().error(error, last_checkpoint=None, next_command=None)
    return error.exit_code
