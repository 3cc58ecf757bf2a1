"""Newborn weights."""

from __future__ import annotations

import torch
import transformers

from nemo_like.backends.hf_models import random_weights

MOE = {
    "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "num_experts": 3, "num_experts_per_tok": 1,
    "moe_intermediate_size": 6, "tie_word_embeddings": False,
}  # fmt: skip


def test_newborn_experts_are_those_of_a_model_that_transformers_load(tmp_path):
    from safetensors.torch import save_file

    config = transformers.Qwen3MoeConfig(**MOE)
    weights = {name: w.contiguous() for name, w in random_weights(config, 3)}
    config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, told = transformers.Qwen3MoeForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values())
    torch.manual_seed(3)
    expected = transformers.Qwen3MoeForCausalLM(config).state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in loaded.state_dict().items())
