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
    place = Place(tmp_path_factory.mktemp("supervised"))
    file = place.root / "short.yaml"
    file.write_text(place.supervised_config(150))
    return file
