"""What a forecast says of a rank is what a real rank then holds and sends."""

from __future__ import annotations

import json

import pytest

from nemo_like.plan.watch import GATHERED

CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "vocab_size": 272,
}  # fmt: skip
EXPERTS = CONFIG | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4,
    "moe_intermediate_size": 48, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
CP, EP = "context_parallel_size", "expert_model_parallel_size"
LAYOUTS = {
    "FSDP2 over 2": (2, {"dtensor_cfg": {}}),
    "FSDP2 over 2, recomputed": (2, {"dtensor_cfg": {"activation_checkpointing": True}}),
    "TP 2, recomputed": (
        2,
        {"dtensor_cfg": {"tensor_parallel_size": 2, "activation_checkpointing": True}},
    ),
    "HSDP": (4, {"dtensor_cfg": {"dp_replicate_size": 2}}),
    "Megatron, TP 2": (2, {"megatron_cfg": {TP: 2, "sequence_parallel": True}}),
    "Megatron, PP 2": (2, {"megatron_cfg": {PP: 2}}),
    "Megatron, shared optimizer": (2, {"megatron_cfg": {}}),
    "Megatron, CP 2": (2, {"megatron_cfg": {CP: 2}}),
    "Megatron, experts, EP 2": (2, {"megatron_cfg": {EP: 2}}),
    "Megatron, experts, TP 2 x EP 2": (
        2,
        {"megatron_cfg": {TP: 2, EP: 2, "sequence_parallel": True}},
    ),
}


def policy_of(folder, block):
    from nemo_like.config.policy import PolicyConfig

    own = {name: {"enabled": True} | settings for name, settings in block.items()}
    if "megatron_cfg" in own and PP in own["megatron_cfg"]:
        own["megatron_cfg"]["num_layers_in_first_pipeline_stage"] = 3
    return PolicyConfig(
        model_name=folder, init="random", max_total_sequence_length=64, train_micro_batch_size=2,
        train_global_batch_size=16, scheduler={"lr_warmup_iters": 10}, logprob_chunk_size=32,
        **{"dtensor_cfg": {"enabled": False}} | own,
    )  # fmt: skip


def work_of(policy, world):
    from nemo_like.cluster.placement import place
    from nemo_like.config.run import ClusterConfig
    from nemo_like.plan.rehearsal import Work
    from nemo_like.run.build import parallel_sizes

    cluster = ClusterConfig(gpus_per_node=0, cpu_workers_per_node=world)
    placement = place(cluster, parallel_sizes(policy), gpus_found=0)
    return Work.of(policy, placement.num_data_parallel)


def found_on_this_rank(folder, block):
    """What a whole step takes of this rank, all layers and micro-batches of it."""
    import torch.distributed as dist

    from nemo_like.backends.factory import BackendFactory
    from nemo_like.backends.settings import BackendSettings
    from nemo_like.losses.nll import NLL
    from nemo_like.plan.rehearsal import observe, routes

    policy = policy_of(folder, block)
    work = work_of(policy, dist.get_world_size())
    backend = BackendFactory(policy, BackendSettings(seed=0))()
    backend.begin(total_steps=10)
    with routes(policy):
        found = observe(policy, backend, work.share(work.num_micro_batches), NLL())
    backend.close()
    return {
        "peak": dict(found.peak),
        "after_forward": dict(found.after_forward),
        "sent": sent_by(found),
        "flops": dict(found.flops),
    }


def sent_by(found):
    """Bytes by part of the step, sort of message and ranks."""
    sent = {}
    for m, amount in found.sent.items():
        if amount:
            key = f"{m.part}, {m.sort}, {m.ranks}"
            sent[key] = sent.get(key, 0) + amount
    return sent


@pytest.mark.parametrize(
    "label",
    [
        pytest.param(label, marks=pytest.mark.slow if label == "Megatron, experts, EP 2" else ())
        for label in LAYOUTS
    ],
)
def test_a_rank_holds_and_sends_what_the_forecast_says(pool, tmp_path, label):
    from nemo_like.plan.rehearsal import rehearse

    world, block = LAYOUTS[label]
    config = EXPERTS if "experts" in label else CONFIG
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy = policy_of(str(tmp_path), block)
    work = work_of(policy, world)
    real = pool(world).run(found_on_this_rank, str(tmp_path), block, timeout_s=200)
    stages = 2 if "PP" in label else 1
    layers = (3, 2) if stages == 2 else (5,)
    for stage in range(stages):
        rank = stage * world // stages
        forecast = rehearse(
            policy, world, rank, work, layers=layers[stage], stages_behind=stages - 1 - stage
        )
        assert sent_by(forecast) == pytest.approx(real[rank]["sent"], rel=1e-9)
        assert forecast.flops == pytest.approx(real[rank]["flops"], rel=1e-9)
        for moment in ("peak", "after_forward"):
            expected = sum(real[rank][moment].values())
            found = getattr(forecast, moment)
            assert sum(found.values()) == pytest.approx(expected, rel=0.03)
            gathered = real[rank][moment].get(GATHERED, 0)
            assert found.get(GATHERED, 0) == pytest.approx(gathered, rel=1e-9)
