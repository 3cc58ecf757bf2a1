"""Random numbers go on where they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nemo_like.checkpoint import rng
from nemo_like.errors import CheckpointError


def draw():
    # An odd number of gaussians: numpy and Python keep the second of a pair for the next call.
    return [
        random.gauss(0, 1),
        random.random(),
        np.random.randn(),
        np.random.rand(),
        *torch.randn(3).tolist(),
    ]


def test_all_generators_go_on_exactly_where_they_were_saved(tmp_path):
    draw()
    rng.save(tmp_path, rank=1, world_size=2)
    rng.save(tmp_path, rank=0, world_size=2)
    expected = draw()
    draw()
    assert rng.load(tmp_path, rank=1, world_size=2)
    assert draw() == expected


def test_on_another_world_size_nothing_is_restored_and_the_caller_is_told(tmp_path):
    rng.save(tmp_path, rank=0, world_size=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert not rng.load(tmp_path, rank=0, world_size=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_rank_is_named(tmp_path):
    rng.save(tmp_path, rank=0, world_size=2)
    with pytest.raises(CheckpointError, match="rank_1.json"):
        rng.load(tmp_path, rank=1, world_size=2)


def test_a_state_of_a_gpu_is_not_dropped_silently():
    with pytest.raises(CheckpointError, match="with a GPU.*gpus_per_node"):
        rng.restore({**rng.capture(), "cuda": "00"})
