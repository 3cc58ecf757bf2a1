"""Blocks of packed matrices are filled from Hugging Face tensors, and give them back."""

from __future__ import annotations

import pytest
import torch
import transformers

from nemo_like.backends.hf_models import random_weights
from nemo_like.backends.megatron.convert import WeightTable
from nemo_like.backends.megatron.weights import (
    WholeWeights,
    canonical,
    load_weights,
    local_blocks,
)
from nemo_like.checkpoint.store import StateWriter, load_state

CONFIG = {
    "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture
def config():
    return transformers.Qwen3Config(**CONFIG, head_dim=2)


def parts_of_rank(table, rank):
    """Parameters of a tensor-parallel rank, not filled yet."""
    return {
        name: torch.full(table.local_box(name, rank)[1], float("nan")) for name in table.entries
    }


def blocks_of(table, tensors, rank=0):
    return local_blocks(table, tensors, tp_rank=rank, expert_tp_rank=rank)


def test_weights_return_to_the_bit_even_negative_zeros(config):
    table = WeightTable(config)
    weights = {name: w.clone() for name, w in random_weights(config, 1)}
    weights["model.norm.weight"][2:4] = torch.tensor([-0.0, 1e-45])
    blocks = blocks_of(table, parts_of_rank(table, 0))
    load_weights(table, blocks, weights.items())
    for name, whole in WholeWeights(table, blocks):
        assert whole.view(torch.int32).equal(weights.pop(name).view(torch.int32))
    assert not weights


def test_rows_that_pad_the_vocabulary_become_zero(config):
    table = WeightTable(config, tp_size=2)
    last = parts_of_rank(table, 1)
    load_weights(table, blocks_of(table, last, 1), random_weights(config, 1))
    assert not any(t.isnan().any() for t in last.values())
    assert last[EMBEDDING].shape[0] == 7 and not last[EMBEDDING][6:].any()
    assert last[EMBEDDING][5].any()


def test_a_copy_of_a_tied_embedding_on_the_last_stage_is_filled_too():
    config = transformers.LlamaConfig(**CONFIG | {"tie_word_embeddings": True})
    table = WeightTable(config)
    own = {"output_layer.weight": torch.zeros(13, 8)}
    weights = dict(random_weights(config, 1))
    load_weights(table, blocks_of(table, own), weights.items())
    assert own["output_layer.weight"].equal(weights["model.embed_tokens.weight"])


def test_state_of_an_optimizer_moves_from_packed_to_plain_and_back(config, tmp_path):
    table = WeightTable(config)
    momenta = {name: torch.randn(entry.shape) for name, entry in table.entries.items()}
    state = canonical(table, blocks_of(table, momenta))
    with StateWriter(asynchronous=False) as writer:
        writer.save(tmp_path, {"state": {"exp_avg": state}})
    plain = {name: torch.zeros(shape) for name, shape in table.hf_shapes.items()}
    load_state(tmp_path / "state", {"exp_avg": plain})
    q, k, v = (plain[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    assert momenta[QKV].equal(torch.cat([q[:4], k[:2], v[:2], q[4:], k[2:], v[2:]]))
    again = {name: torch.zeros_like(momentum) for name, momentum in momenta.items()}
    load_state(tmp_path / "state", {"exp_avg": canonical(table, blocks_of(table, again))})
    assert all(again[name].equal(momenta[name]) for name in momenta)


def test_blocks_that_leave_a_part_out_are_refused_before_the_first_tensor(config):
    table = WeightTable(config, tp_size=2)
    with pytest.raises(ValueError, match=r"hold 56 of model.embed_tokens.weight's 104 elements"):
        WholeWeights(table, blocks_of(table, parts_of_rank(table, 0)))
