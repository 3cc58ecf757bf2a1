from __future__ import annotations

import pytest
import torch
from torch import nn

from nemo_like.errors import ConfigError
from nemo_like.optim.routing import embedding_names, route
from nemo_like.optim.views import WHOLE, View


def parameter(*shape: int, trainable: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=trainable)


def owner(name: str, *shape: int) -> str:
    (row,) = route([(name, parameter(*shape))], "muon").rows
    return row.optimizer


HIDDEN = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.gate_up_proj.weight",
    "model.layers.0.mlp.shared_expert.down_proj.weight",
    "decoder.layers.3.mlp.linear_fc1.weight",
    "transformer.h.0.attn.c_attn.weight",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.0.conv.in_proj.weight",
    "model.layers.0.per_layer_input_gate.weight",
    "decoder.layers.0.mlp.experts.linear_fc1.weight2",
    "encoder.layers.0.pre_encoder.proj.weight",
]
ELSEWHERE = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "output_layer.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "embedding.position_embeddings.weight",
    "encoder.pos_embed",
    "score.weight",
    "head.weight",
    "encoder.blocks.0.attn.rel_pos_h",
    "vision.position_embedding_table",
    "layers.0.relative_position_bias_table",
    "resampler.latents",
    "bridge.query_tokens",
    "decoder.layers.0.mlp.experts.weight1",
    "transformer.blocks.0.ffn.experts.mlp.w1",
    "visual.conv1.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.block_sparse_moe.gate.weight",
    "model.layers.0.mlp.router.weight",
    "model.layers.0.mlp.shared_expert_gate.weight",
    "base.layers.0.q_proj.lora_A.default.weight",
    "model.layers.0.mlp.experts.gate_up_proj_bias",
    "layers.0.relative_attention_bias.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "mixer.conv1d.weight",
    "mixer.A_log",
    "visual.patch_embed.proj.weight",
]


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_matrix_goes_to_muon(name):
    assert owner(name, 8, 6) == "muon"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_matrix_with_another_meaning_goes_to_adamw(name):
    assert owner(name, 8, 6) == "adamw"


@pytest.mark.parametrize("shape", [(8,), (), (1, 8), (8, 1), (8, 4, 3), (8, 4, 3, 3)])
def test_a_tensor_that_is_no_matrix_goes_to_adamw(shape):
    assert owner("model.layers.0.mixer.proj.weight", *shape) == "adamw"


def test_a_stack_of_experts_goes_to_muon():
    assert owner("model.layers.0.mlp.experts.gate_up_proj", 4, 8, 6) == "muon"


def test_a_router_is_called_one_though_it_classifies():
    (row,) = route([("mlp.router.classifier.weight", parameter(8, 6))], "muon").rows
    assert row.reason == "router"


# Of models of transformers: whose parameters are not what their names make one think.
DOUBTFUL = {
    "qwen3_moe": {"mlp.gate.weight": "adamw", "experts.gate_up_proj": "muon"},
    "qwen3_next": {
        "mlp.shared_expert_gate.weight": "adamw",
        "linear_attn.conv1d.weight": "adamw",
        "linear_attn.in_proj_qkvz.weight": "muon",
    },
    "gpt_oss": {
        "mlp.router.weight": "adamw",
        "experts.gate_up_proj_bias": "adamw",
        "experts.down_proj": "muon",
    },
    "deepseek_v3": {
        "self_attn.kv_b_proj.weight": "muon",
        "mlp.gate_proj.weight": "muon",
    },
    "lfm2": {"conv.conv.weight": "adamw", "conv.in_proj.weight": "muon"},
    "mamba": {
        "mixer.A_log": "adamw",
        "mixer.conv1d.weight": "adamw",
        "mixer.in_proj.weight": "muon",
    },
    "longcat_flash": {"router.classifier.weight": "adamw", "self_attn.0.q_b_proj.weight": "muon"},
    "rwkv": {"head.weight": "adamw", "time_mix_key": "adamw", "attention.key.weight": "muon"},
    "gpt2": {"wpe.weight": "adamw", "attn.c_attn.weight": "muon"},
    "opt": {"decoder.embed_positions.weight": "adamw", "fc1.weight": "muon"},
}
SMALL = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("family", DOUBTFUL)
def test_real_models_are_divided_by_what_their_parameters_are(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    more = {"layer_types": ["conv", "full_attention"]} if family == "lfm2" else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **more))
    rows = route(model.named_parameters(), "muon", embeddings=embedding_names(model)).rows
    found = {
        ending: {row.optimizer for row in rows if row.name.endswith(ending)}
        for ending in DOUBTFUL[family]
    }
    assert found == {ending: {owner} for ending, owner in DOUBTFUL[family].items()}
    assert not [row.name for row in rows if row.optimizer == "muon" and 37 in row.shape]


def test_a_row_says_how_muon_cuts_its_tensor_and_a_checkpoint_does_not():
    halves = View(sizes=(4, 4), label="gate and up apart")
    named = [("a.weight", parameter(8, 6)), ("b.bias", parameter(8))]
    first, second = (routing := route(named, "muon", view=lambda names, shape: halves)).rows
    assert (first.view, first.reason) == (halves, "hidden matrix: gate and up apart")
    assert (second.view, second.reason) == (WHOLE, "one-dimensional")
    assert "view" not in routing.to_json()[0]


def test_a_tied_parameter_is_claimed_once_and_judged_by_all_its_names():
    shared = parameter(10, 4)
    routing = route([("proj.weight", shared), ("lm_head.weight", shared)], "muon")
    (row,) = routing.rows
    assert (row.name, row.optimizer) == ("proj.weight", "adamw")


def test_frozen_parameters_are_left_out():
    named = [("a.weight", parameter(4, 4, trainable=False)), ("b.weight", parameter(4, 4))]
    assert [row.name for row in route(named, "muon").rows] == ["b.weight"]


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        route([("a.weight", parameter(4, 4, trainable=False))], "adamw")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_other_optimizers_take_every_parameter(optimizer):
    named = [("embed.weight", parameter(4, 4)), ("b.weight", parameter(4, 4)), ("c", parameter(4))]
    assert route(named, optimizer).names(optimizer) == ("embed.weight", "b.weight", "c")


def test_embeddings_of_a_model_are_known_whatever_their_names():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "proj": nn.Linear(4, 4, bias=False)})
    known = embedding_names(model)
    routing = route(model.named_parameters(), "muon", embeddings=known)
    assert (routing.names("adamw"), routing.names("muon")) == (("table.weight",), ("proj.weight",))


def test_patterns_overrule_the_rules():
    named = [("mlp.gate.weight", parameter(4, 4)), ("attn.q_proj.weight", parameter(4, 4))]
    routing = route(named, "muon", include=[r"mlp\.gate\."], exclude=["q_proj"])
    assert routing.names("muon") == ("mlp.gate.weight",)
    assert routing.rows[1].reason == "muon_exclude 'q_proj'"


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (["nowhere"], [], "muon_include: 'nowhere' matches none of 2"),
        ([], ["nowhere"], "muon_exclude: 'nowhere' matches none of 2"),
        (["("], [], "not a regular expression"),
        (["proj"], ["proj"], "muon_include .* and muon_exclude"),
        (["norm"], [], "Muon needs a matrix"),
    ],
)
def test_a_pattern_that_can_not_be_meant_is_refused(include, exclude, message):
    named = [("attn.proj.weight", parameter(4, 4)), ("norm.weight", parameter(4))]
    with pytest.raises(ConfigError, match=message):
        route(named, "muon", include=include, exclude=exclude)
