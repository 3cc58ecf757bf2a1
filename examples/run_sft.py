r"""Supervised fine-tuning.

Without arguments a tiny model learns arithmetic, in a minute. The second line does the same with
Muon, the third trains a model of your choice on your data.

    uv run examples/run_sft.py
    uv run examples/run_sft.py policy.optimizer.optimizer=muon
    uv run examples/run_sft.py --config configs/sft.yaml \
        policy.model_name=... data.train.data_path=...
    uv run examples/run_sft.py --help
"""

import sys
from pathlib import Path

from nemo_like.config.sft import SFTTree
from nemo_like.run.main import main


def run():
    """The function that trains; imported only when something is going to be trained."""
    from nemo_like.run.sft import run_sft

    return run_sft


def dry_run():
    """The function that tells what would happen."""
    from nemo_like.plan.dry_run import dry_run_sft

    return dry_run_sft


if __name__ == "__main__":
    sys.exit(
        main(
            sys.argv[1:],
            tree=SFTTree,
            default_config=Path("configs/sft_tiny.yaml"),
            run=run,
            dry_run=dry_run,
        )
    )
