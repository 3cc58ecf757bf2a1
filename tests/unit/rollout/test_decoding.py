"""Decoding with fewer copies is decoding: cache and attention against those of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nemo_like.rollout.decoding import GrowingLayer, grouped_attention


def tokens(count: int, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, count, 8), torch.randn(batch, 2, count, 8)


def test_a_growing_layer_holds_what_a_dynamic_one_holds_whatever_is_added_and_selected():
    torch.manual_seed(0)
    growing, dynamic = GrowingLayer(), DynamicLayer()
    for step in range(300):
        new = tokens(5 if step % 7 == 0 else 1, batch=3 if step < 150 else 4)
        held = growing.update(*new)
        assert all(map(torch.equal, held, dynamic.update(*new)))
        if step in (0, 149):
            for layer in (growing, dynamic):
                layer.batch_select_indices(torch.tensor([2, 0, 2] if step == 0 else [1, 0, 2, 2]))
        assert growing.get_seq_length() == dynamic.get_seq_length()
    assert torch.equal(growing.keys, dynamic.keys)


def test_a_token_is_written_behind_the_others_and_they_stay_where_they_are():
    growing = GrowingLayer()
    growing.update(*tokens(100))
    places = set()
    for _ in range(70):
        growing.update(*tokens(1))
        places.add(growing.keys.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("num_new", [1, 4])
def test_heads_that_share_keys_attend_as_if_each_had_its_own(heads, is_padded, num_new):
    torch.manual_seed(0)
    query = torch.randn(3, heads, num_new, 8)
    key, value = tokens(9)
    mask = torch.ones(3, 1, num_new, 9, dtype=torch.bool)
    mask[1, :, :, :4] = False
    module = torch.nn.Module()
    module.num_key_value_groups = heads // 2
    arguments = (module, query, key, value, mask if is_padded else None)
    expected, _ = sdpa_attention_forward(*arguments, scaling=0.3)
    found, _ = grouped_attention(*arguments, scaling=0.3)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
