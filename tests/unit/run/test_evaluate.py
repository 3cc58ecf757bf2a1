"""The weights that an evaluation reads."""

from __future__ import annotations

import transformers

from nemo_like.backends.hf_models import hub_shapes
from nemo_like.config.generation import RolloutPolicyConfig
from nemo_like.run.evaluate import SavedWeights


def test_saved_experts_are_read_one_by_one_under_their_names_on_the_hub(tmp_path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=6,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    backend = {"megatron_cfg": {"enabled": True}, "dtensor_cfg": {"enabled": False}}
    policy = RolloutPolicyConfig.model_validate({"model_name": str(tmp_path), **backend})
    read = {name: tuple(tensor.shape) for name, tensor in SavedWeights(policy).export_weights()}
    assert read == hub_shapes(config)
