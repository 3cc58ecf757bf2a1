r"""Evaluation: how many held-out problems a model solves, greedily and in several tries.

The model is a checkpoint (`results/.../step_40`), its `hf` folder, or any Hugging Face model.

    uv run examples/run_eval.py policy.model_name=results/grpo_math-1a2b3c4d/step_40
    uv run examples/run_eval.py policy.model_name=... grpo.val_num_generations_per_prompt=8
    uv run examples/run_eval.py --config configs/grpo_math_1B.yaml policy.model_name=...
    uv run examples/run_eval.py --help
"""

import sys
from pathlib import Path

from nemo_like.config.grpo import GRPOTree
from nemo_like.run.main import main


def run():
    """The function that evaluates; imported only when something is going to be evaluated."""
    from nemo_like.run.evaluate import run_evaluate

    return run_evaluate


def dry_run():
    """The function that tells what would happen."""
    from nemo_like.run.evaluate import dry_run_evaluate

    return dry_run_evaluate


if __name__ == "__main__":
    sys.exit(
        main(
            sys.argv[1:],
            tree=GRPOTree,
            default_config=Path("configs/eval_math.yaml"),
            run=run,
            dry_run=dry_run,
        )
    )
