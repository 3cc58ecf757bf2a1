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
