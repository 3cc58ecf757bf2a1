"""examples/run_grpo.py, under the name that guides for NeMo-RL use."""

import sys

from run_grpo import start

if __name__ == "__main__":
    sys.exit(start())
