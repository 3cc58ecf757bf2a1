"""What a dry run says of Muon is what training then finds."""

from __future__ import annotations

import json

import pytest

CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
    "vocab_size": 64,
}  # fmt: skip


def policy_of(folder, dtensor):
    from nemo_like.config.policy import PolicyConfig

    return PolicyConfig(
        model_name=folder, init="random", precision="float32", max_total_sequence_length=64,
        optimizer={"optimizer": "muon", "muon_bucket_mb": 0.02}, dtensor_cfg=dtensor,
    )  # fmt: skip


def outlook_in_training(folder, dtensor):
    from nemo_like.backends.factory import BackendFactory
    from nemo_like.backends.settings import BackendSettings

    backend = BackendFactory(policy_of(folder, dtensor), BackendSettings(seed=0))()
    found = backend.begin(total_steps=10).outlook
    backend.close()
    return found


@pytest.mark.parametrize("dtensor", [{"tensor_parallel_size": 2}, {"dp_replicate_size": 2}])
def test_a_dry_run_foresees_owners_and_what_is_sent(pool, tmp_path, dtensor):
    from nemo_like.cluster.placement import place
    from nemo_like.config.run import ClusterConfig
    from nemo_like.optim.outlook import outlook
    from nemo_like.plan.dry_run import planned_exchange, planned_routing
    from nemo_like.run.build import parallel_sizes

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    policy = policy_of(str(tmp_path), dtensor)
    cluster = ClusterConfig(gpus_per_node=0, cpu_workers_per_node=4)
    placement = place(cluster, parallel_sizes(policy), gpus_found=0)
    routing = planned_routing(policy)
    plans = planned_exchange(policy, routing, placement)
    planned = outlook(policy.active_optimizer, routing, plans)
    assert planned["owners"].startswith("4 ranks with 3 to 4 matrices each")
    assert "bucket" in planned["sent in a step"]
    assert pool(4).run(outlook_in_training, str(tmp_path), dtensor) == [planned] * 4
