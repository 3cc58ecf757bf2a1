r"""GRPO and DAPO: reinforcement learning from groups of rollouts.

Without arguments the tiny model of examples/run_sft.py learns to work step by step, in minutes. The
second line does the same with Muon, the third as DAPO, the fourth trains a model of your choice.

    uv run examples/run_grpo.py
    uv run examples/run_grpo.py policy.optimizer.optimizer=muon
    uv run examples/run_grpo.py --config configs/dapo_math.yaml
    uv run examples/run_grpo.py --config configs/grpo_math_1B.yaml policy.model_name=...
    uv run examples/run_grpo.py --help
"""

import sys
from pathlib import Path

from nemo_like.config.grpo import GRPOTree
from nemo_like.run.main import main


def run():
    """The function that trains; imported only when something is going to be trained."""
    from nemo_like.run.grpo import run_grpo

    return run_grpo


def dry_run():
    """The function that tells what would happen."""
    from nemo_like.plan.dry_run import dry_run_grpo

    return dry_run_grpo


def start() -> int:
    """The exit code of this command line."""
    return main(
        sys.argv[1:],
        tree=GRPOTree,
        default_config=Path("configs/grpo_math.yaml"),
        run=run,
        dry_run=dry_run,
    )


if __name__ == "__main__":
    sys.exit(start())
