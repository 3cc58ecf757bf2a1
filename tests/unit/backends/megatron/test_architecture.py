"""What the Megatron backend does not have is refused, by key, before a model is built."""

from __future__ import annotations

import pytest
import torch
import transformers

from nemo_like.backends.megatron.architecture import inverse_frequencies, refuse_unsupported
from nemo_like.backends.megatron.places import check_divisible
from nemo_like.config.policy import PolicyConfig
from nemo_like.errors import ConfigError

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def policy_of(**keys):
    return PolicyConfig(
        precision="float32", dtensor_cfg={"enabled": False}, megatron_cfg={"enabled": True} | keys
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"activation_checkpointing": True, "recompute_granularity": "selective",
          "recompute_modules": ("moe",)}, "recompute_modules: the model has no layer with 'moe'"),
        ({"tensor_model_parallel_size": 8}, "tensor_model_parallel_size: 8.*num_attention_heads=4"),
        ({"pipeline_model_parallel_size": 3}, "4 layers can not be shared by 3 stages"),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 4},
         "num_layers_in_first_pipeline_stage=4"),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1,
          "num_layers_in_last_pipeline_stage": 2}, "num_layers_in_last_pipeline_stage=2"),
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size: llama has no experts"),
    ],
)  # fmt: skip
def test_a_key_that_can_not_be_honoured_is_refused_by_name(keys, message):
    with pytest.raises(ConfigError, match=message):
        refuse_unsupported(policy_of(**keys), transformers.LlamaConfig(**SHAPE))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tensor_model_parallel_size": 2}, "sequence_parallel: experts under tensor parallelism"),
        ({"expert_model_parallel_size": 3}, "3 does not divide num_experts=4"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn routes otherwise in training"),
        ({"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"},
         "allgather needs as many tokens.*alltoall"),
        ({"pipeline_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"},
         "allgather needs as many tokens.*alltoall"),
    ],
)  # fmt: skip
def test_what_experts_can_not_have_is_refused_by_name(keys, message):
    with pytest.raises(ConfigError, match=message):
        refuse_unsupported(policy_of(**keys), transformers.Qwen3MoeConfig(**SHAPE | MOE))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act: the model has 'gelu'"),
        (transformers.Qwen2Config(**SHAPE, attention_dropout=0.1), "attention_dropout.*0.1"),
        (transformers.Qwen2Config(**SHAPE, use_sliding_window=True), "use_sliding_window"),
        (transformers.LlamaConfig(**SHAPE, attention_bias=True), "attention_bias"),
    ],
)
def test_a_model_with_parts_that_are_not_here_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        refuse_unsupported(policy_of(), config)


def test_groups_of_heads_may_be_split_by_a_multiple_of_their_number_alone():
    config = transformers.LlamaConfig(
        **SHAPE | {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48}
    )
    refuse_unsupported(policy_of(tensor_model_parallel_size=12), config)
    with pytest.raises(ConfigError, match="4 and the model's num_key_value_heads=6"):
        refuse_unsupported(policy_of(tensor_model_parallel_size=4), config)


def test_blocks_of_less_than_a_key_head_are_not_cut_apart():
    own = {"optimizer": "muon", "muon_tp_mode": "blockwise"}
    config = transformers.LlamaConfig(**SHAPE)
    keys = {"tensor_model_parallel_size": 4, "optimizer": own}
    with pytest.raises(ConfigError, match="muon_split_qkv=false"):
        refuse_unsupported(policy_of(**keys), config)
    own["muon_split_qkv"] = False
    refuse_unsupported(policy_of(**keys), config)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 2.0,
         "high_freq_factor": 3.0, "original_max_position_embeddings": 16},
    ],
)  # fmt: skip
def test_rotary_frequencies_are_those_of_transformers(rope):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(**SHAPE, rope_parameters=rope)
    assert torch.equal(inverse_frequencies(config), LlamaRotaryEmbedding(config).inv_freq)


def test_another_rotary_embedding_is_refused():
    rope = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
    with pytest.raises(ConfigError, match="yarn.*default, linear and llama3"):
        refuse_unsupported(policy_of(), transformers.LlamaConfig(**SHAPE, rope_parameters=rope))


@pytest.mark.parametrize(
    ("world", "keys", "message"),
    [
        (6, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
         "6 ranks.*pipeline_model_parallel_size=2.*tensor_model_parallel_size=2.*multiple of 4"),
        (4, {"expert_model_parallel_size": 8}, "expert_model_parallel_size=8.*multiple of 8"),
    ],
)  # fmt: skip
def test_ranks_that_can_not_be_divided_are_refused_with_the_keys(world, keys, message):
    with pytest.raises(ConfigError, match=message):
        check_divisible(policy_of(**keys).megatron_cfg, world)
