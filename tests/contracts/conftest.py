from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_thread_here_as_in_the_workers():
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
