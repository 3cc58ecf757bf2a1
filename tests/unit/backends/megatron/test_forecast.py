"""A run is laid out in advance, from the table of weights alone."""

from __future__ import annotations

import json
import math

import pytest
import transformers

from nemo_like.assets import bundled
from nemo_like.backends.megatron.forecast import Forecast
from nemo_like.backends.megatron.places import layers_of_stages
from nemo_like.config.policy import PolicyConfig
from nemo_like.errors import ConfigError

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP = "expert_model_parallel_size"


def forecast(config, world=1, precision="float32", **keys):
    policy = PolicyConfig(
        precision=precision,
        dtensor_cfg={"enabled": False},
        megatron_cfg={"enabled": True} | keys,
    )
    return Forecast(policy, config, world)


def muon(**own):
    return {"optimizer": {"optimizer": "muon"} | own}


def test_every_weight_of_the_model_has_one_owner():
    config = transformers.Qwen3MoeConfig(**SHAPE | MOE, tie_word_embeddings=False)
    found = forecast(config, 8, **{TP: 2, PP: 2, EP: 2}, sequence_parallel=True, **muon())
    model = transformers.Qwen3MoeForCausalLM(config)
    padding = 32  # of the embedding and of the head: 61 tokens are not even over two ranks
    numbers = sum(math.prod(owner["shape"]) for owner in found.owners)
    assert numbers == sum(p.numel() for p in model.parameters()) + 2 * padding
    owners = {row.name: row.optimizer for row in found.routing.rows}
    assert owners["decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight"] == "muon"
    assert owners["decoder.layers.3.mlp.router.weight"] == "adamw"


def test_owners_are_named_by_what_they_are_made_of():
    names = [owner["name"] for owner in forecast(transformers.LlamaConfig(**SHAPE)).owners]
    qkv = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert f"{qkv} = model.layers.0.self_attn.{{q,k,v}}_proj.weight" in names
    assert "decoder.final_layernorm.weight = model.norm.weight" in names


def test_work_is_planned_for_every_set_of_ranks_that_share_some():
    config = transformers.Qwen3MoeConfig(**SHAPE | MOE)
    layout = {TP: 2, PP: 2, EP: 2, "sequence_parallel": True}
    found = forecast(config, 16, **layout, **muon(optimizer="dist_muon"))
    # Of eight ranks of a stage all share attention; those of each pair of experts share these.
    ranks = sorted(plan.ranks for plan in found.plans)
    assert [r for r in ranks if len(r) == 8] == [tuple(range(8)), tuple(range(8, 16))]
    assert [r for r in ranks if len(r) == 4] == [
        (0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)
    ]  # fmt: skip
    assert sum(len(plan.matrices) for plan in found.plans) == 4 * (2 + 4 * 2)


def test_under_blockwise_each_rank_has_a_matrix_of_its_own():
    config = transformers.LlamaConfig(**SHAPE)
    found = forecast(config, 4, **{TP: 2}, **muon(muon_tp_mode="blockwise"))
    assert sorted(plan.ranks for plan in found.plans) == [(0, 2), (1, 3)]
    assert all(len(plan.matrices) == 4 * 4 for plan in found.plans)


def test_under_blockwise_what_all_tensor_parallel_ranks_have_is_counted_once():
    config = transformers.Qwen3MoeConfig(**SHAPE | MOE)
    found = forecast(
        config, 2, **{TP: 2, "sequence_parallel": True}, **muon(muon_tp_mode="blockwise")
    )
    (router,) = found.layout("decoder.layers.0.mlp.router.weight", tp_rank=1).blocks
    assert router.holders == (0, 1)


def test_a_frozen_router_has_no_owner():
    config = transformers.Qwen3MoeConfig(**SHAPE | MOE)
    rows = forecast(config, freeze_moe_router=True).routing.rows
    assert not [row.name for row in rows if "router" in row.name]


def test_memory_is_that_of_the_fullest_rank():
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)
    count = 2 * 61 * 32 + 32 + 4 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    state = "optimizer state (fp32)"
    alone = forecast(config, 1).memory()
    assert (alone["weights"], alone["gradients"]) == (4 * count, 4 * count)
    assert (alone["fp32 masters"], alone[state]) == (0, 8 * count)  # masters are the weights
    whole = forecast(config, 2, optimizer={"use_distributed_optimizer": False}).memory()
    assert (whole["fp32 masters"], whole[state]) == (0, 8 * count)
    mixed = forecast(config, 2, "bfloat16").memory()
    assert (mixed["weights"], mixed["gradients"]) == (2 * count, 4 * count)
    assert mixed["fp32 masters"] == pytest.approx(2 * count, rel=0.01)  # rows are whole
    assert mixed["together"] == sum(mixed.values()) / 2


def test_tied_ends_of_a_pipeline_hold_the_embedding_both():
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True)
    found = forecast(config, 2, **{PP: 2})
    assert found.layout("embedding.word_embeddings.weight").ranks == (0, 1)
    assert "output_layer.weight" not in {row.name for row in found.routing.rows}


def test_the_largest_bundled_model_has_its_235_billion_weights():
    config = json.loads((bundled("Qwen/Qwen3-235B-A22B") / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config = transformers.Qwen3MoeConfig.from_dict(config | {"num_hidden_layers": 1})
    assert config.num_experts == 128 and config.rope_parameters["rope_theta"] == 1e6
    found = forecast(config, 128, **{TP: 8, EP: 8}, sequence_parallel=True)
    table = found.table
    ends = sum(
        math.prod(shape) for name, shape in table.hf_shapes.items() if ".layers." not in name
    )
    whole = sum(math.prod(shape) for shape in table.hf_shapes.values())
    assert ends + layers * (whole - ends) == 235_093_634_560


@pytest.mark.parametrize(
    ("pp", "first", "last", "counts"),
    [
        (8, 11, 11, (11, 12, 12, 12, 12, 12, 12, 11)),
        (1, None, None, (94,)),
        (2, None, None, (47, 47)),
        (2, 10, None, (10, 84)),
        (2, 50, 44, (50, 44)),
        (3, None, 30, (32, 32, 30)),
    ],
)
def test_layers_are_shared_evenly_but_for_the_ends(pp, first, last, counts):
    config = PolicyConfig(
        dtensor_cfg={"enabled": False},
        megatron_cfg={
            "enabled": True,
            PP: pp,
            "num_layers_in_first_pipeline_stage": first,
            "num_layers_in_last_pipeline_stage": last,
        },
    ).megatron_cfg
    assert layers_of_stages(config, 94) == counts


@pytest.mark.parametrize(
    ("world", "keys", "message"),
    [
        (6, {TP: 4}, "6 ranks can not be divided"),
        (4, {EP: 8}, "expert_model_parallel_size"),
        (1, {"optimizer": {"optimizer": "muon", "muon_exclude": ("q_proj",)}}, "keeps in one matr"),
        (1, {"optimizer": {"optimizer": "muon", "muon_exclude": ("nothing",)}}, "matches none"),
    ],
)
def test_what_workers_would_refuse_is_refused_here(world, keys, message):
    config = transformers.Qwen3MoeConfig(**SHAPE | MOE | {"num_experts": 8})
    if TP in keys:
        keys = keys | {"sequence_parallel": True}
    with pytest.raises(ConfigError, match=message):
        assert forecast(config, world, **keys).routing
