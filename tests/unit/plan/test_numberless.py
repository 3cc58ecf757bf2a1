"""A rank without numbers runs the same code, and remembers nothing of it afterwards."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

from nemo_like.errors import ConfigError
from nemo_like.plan.devices import DEVICES, device_named
from nemo_like.plan.numberless import rank_of
from nemo_like.plan.watch import GRADIENTS, LOGITS, TEMPORARY, Watch


def test_numbers_take_no_memory_and_integers_are_real():
    with rank_of(128, 5):
        assert (dist.get_world_size(), dist.get_rank()) == (128, 5)
        whole = torch.empty(10**6, 10**6)  # 4 TB
        mask = torch.tensor([True, False, True])
        assert whole[:3][mask].shape == (2, 10**6)
        assert whole[:3, 0].masked_select(mask).shape == (2,)
        assert float(whole.sum()) == 1.0 and torch.arange(3).tolist() == [0, 1, 2]
        everyone = [None] * 128
        dist.all_gather_object(everyone, "mine")
        assert everyone == ["mine"] * 128


def test_a_process_is_itself_again_afterwards():
    hook, new_group = sys.excepthook, dist.new_group
    with pytest.raises(ZeroDivisionError), rank_of(2, 0):
        torch.ones(1 // 0)
    assert not dist.is_initialized()
    assert sys.excepthook is hook and dist.new_group is new_group
    assert torch.ones(2).sum().item() == 2


def test_what_is_sent_is_what_leaves_this_rank():
    with rank_of(4, 0) as mode, Watch(numberless=mode.fake) as watch:
        dist.all_reduce(torch.ones(100))
        dist.all_gather_into_tensor(torch.ones(400), torch.ones(100))
        dist.reduce_scatter_tensor(torch.ones(100), torch.ones(400))
        dist.all_to_all_single(torch.ones(8), torch.ones(8))
    assert {message.sort: amount for message, amount in watch.sent.items()} == {
        "all-reduce": 2 * 400 * 3 / 4,
        "all-gather": 400 * 3,
        "reduce-scatter": 1600 * 3 / 4,
        "all-to-all": 32 * 3 / 4,
    }


def test_memory_is_booked_while_it_lives():
    with Watch(vocab_sizes={50}) as watch:
        weight = torch.ones(50, 10, requires_grad=True)
        logits = torch.ones(4, 10) @ weight.T
        watch.name(GRADIENTS, [weight])
        assert watch.held[GRADIENTS] == 2000 and watch.held[LOGITS] == 800
        logits.sum().backward()
        del logits
    assert watch.held[LOGITS] == 0
    assert watch.usage["loss"].peak[TEMPORARY] > 0
    assert watch.usage["layers"].flops == 2 * 4 * 10 * 50 * 2


def test_a_device_that_is_not_known_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean h100-80gb\? Known are a100-80gb"):
        device_named("h100-80")
    assert all(device.source for device in DEVICES.values())
