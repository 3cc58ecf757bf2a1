from __future__ import annotations

import os

import pytest
import torch

from tests.e2e.commands import Place


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Exactness to the bit is promised for the same number of threads."""
    os.environ["OMP_NUM_THREADS"] = "1"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture(scope="session")
def sft_config(tmp_path_factory):
    """A supervised run of some seconds; GRPO makes its weights when it first begins with them."""
    root = tmp_path_factory.mktemp("supervised")
    file = root / "short.yaml"
    file.write_text(
        f"""
defaults: [sft_tiny, _self_]
sft: {{max_num_steps: 150, val_period: 0, val_at_start: false, val_at_end: false}}
cluster: {{launcher: local}}
checkpointing: {{checkpoint_dir: {root}/checkpoints, metric_name: null}}
logger: {{log_dir: {root}/logs}}
"""
    )
    return file
