"""Megatron's layouts take the steps of one process on the other backend, and continue its runs."""

import json
from functools import cache

import pytest
from test_layouts import CLASSES, alone, assert_same_training, models, over_ranks  # noqa: F401
from test_layouts import train_on_this_rank as train

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
CP = "context_parallel_size"
SP = {"sequence_parallel": True}
LAYOUTS = {
    "1 process": (1, {}),
    "TP 2": (2, {TP: 2}),
    "TP 2 with SP": (2, {TP: 2} | SP),
    "PP 2": (2, {PP: 2}),
    "CP 2": (2, {CP: 2}),
    "DP 2, shared optimizer": (2, {}),
    "DP 2": (2, {"optimizer": {"use_distributed_optimizer": False}}),
    "TP 2 x PP 2": (4, {TP: 2, PP: 2}),
    "TP 2 x DP 2, shared optimizer": (4, {TP: 2}),
    "TP 4 over 2 key heads": (4, {TP: 4}),
}
each_layout = pytest.mark.parametrize("label", LAYOUTS)


def run(pool, folder, label, options):
    world, megatron = LAYOUTS[label]
    backend = {"megatron_cfg": megatron}
    return over_ranks(pool(world).run(train, str(folder), backend, options, timeout_s=200))


@each_layout
def test_adamw_takes_the_steps_of_the_other_backend(models, pool, alone, label):  # noqa: F811
    name = "qwen2" if label == "TP 2" else "llama" if label == "PP 2" else "qwen3"
    found = run(pool, models / name, label, {})
    assert_same_training(found, alone(name))
    assert found["owners"] == alone(name)["owners"]


@each_layout
@pytest.mark.parametrize("optimizer", [pytest.param("muon", marks=pytest.mark.slow), "dist_muon"])
def test_muon_takes_the_steps_of_the_other_backend(models, pool, alone, label, optimizer):  # noqa: F811
    options = {"optimizer": {"optimizer": optimizer, "muon_bucket_mb": 0.02}}
    found = run(pool, models / "qwen3", label, options)
    expected = alone("qwen3", optimizer={"optimizer": "muon", "muon_bucket_mb": 0.02})
    assert_same_training(found, expected)
    assert found["owners"] == expected["owners"]
    for key in ("muon/update_rms", "adamw/update_rms"):
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-3)


@pytest.mark.parametrize("label", ["TP 2 with SP", "TP 2 x PP 2"])
def test_policy_gradients_of_recorded_rollouts_are_those_of_the_other_backend(
    models,  # noqa: F811
    pool,
    alone,  # noqa: F811
    label,
):
    options = {"on_rollouts": True}
    assert_same_training(run(pool, models / "qwen3", label, options), alone("qwen3", **options))


EXPERT, EXPERT_TP = "expert_model_parallel_size", "expert_tensor_parallel_size"
MOE_LAYOUTS = {
    "EP 2": (2, {EXPERT: 2}),
    "DP 2, shared optimizer": (2, {}),
    "TP 2 with SP, experts too": (2, {TP: 2, EXPERT_TP: 2} | SP),
    "TP 2 with SP, EP 2": (2, {TP: 2, EXPERT: 2} | SP),
    "PP 2 x EP 2": (4, {PP: 2, EXPERT: 2}),
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A model of four experts, of which each token has two."""
    folder = tmp_path_factory.mktemp("moe")
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64,
        "intermediate_size": 96, "moe_intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64,
        "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "tie_word_embeddings": False,
        "max_position_embeddings": 128, "initializer_range": 0.08,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def alone_with_experts(moe, pool):
    """What one process finds, by optimizer."""

    @cache
    def of(optimizer):
        options = {"optimizer": {"optimizer": optimizer}, "steps": 10}
        return half_a_run(pool, moe, {"megatron_cfg": {}}, 1, options)

    return of


@pytest.mark.parametrize(
    "optimizer", ["adam", pytest.param("muon", marks=pytest.mark.slow), "dist_muon"]
)
@pytest.mark.parametrize("label", MOE_LAYOUTS)
def test_experts_take_the_steps_of_one_process(moe, pool, alone_with_experts, label, optimizer):
    world, megatron = MOE_LAYOUTS[label]
    options = {"optimizer": {"optimizer": optimizer}, "steps": 10}
    found = half_a_run(pool, moe, {"megatron_cfg": megatron}, world, options)
    expected = alone_with_experts("adam" if optimizer == "adam" else "muon")
    assert_same_training(found, expected)
    assert found["owners"] == expected["owners"]
    owner = found["owners"]["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert owner == ("adamw" if optimizer == "adam" else "muon")
    assert found["owners"]["model.layers.1.mlp.gate.weight"] == "adamw"


@pytest.mark.parametrize("optimizer", ["adam", "dist_muon"])
def test_experts_are_shared_out_anew_when_a_run_goes_on(
    moe, pool, alone_with_experts, tmp_path, optimizer
):
    options, saved = {"optimizer": {"optimizer": optimizer}}, {"save": str(tmp_path)}
    expert_parallel, pipeline = {"megatron_cfg": {EXPERT: 2}}, {"megatron_cfg": {PP: 2}}
    half_a_run(pool, moe, expert_parallel, 2, options | saved | {"steps": 4})
    loaded = {"load": str(tmp_path), "steps": 10}
    found = half_a_run(pool, moe, pipeline, 2, options | loaded)
    expected = alone_with_experts("adam" if optimizer == "adam" else "muon")
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key][4:], abs=1e-6)


def compare_with_forecast(folder, megatron, optimizer, precision):
    """What this rank holds, in bytes, if all of it is laid out as was said without any process."""
    import torch.distributed as dist

    from nemo_like.backends.megatron.forecast import Forecast
    from nemo_like.backends.settings import BackendSettings
    from nemo_like.config.policy import PolicyConfig
    from nemo_like.run.build import policy_factory
    from nemo_like.run.model_config import hf_config_of

    policy = PolicyConfig(
        model_name=folder, init="random", precision=precision, optimizer=optimizer,
        dtensor_cfg={"enabled": False}, megatron_cfg={"enabled": True} | megatron,
    )  # fmt: skip
    backend = policy_factory(policy, BackendSettings(seed=0))()
    forecast = Forecast(policy, hf_config_of(policy), dist.get_world_size())
    rows = {row.name: row for row in forecast.routing.rows}
    for row in backend.routing.rows:
        if row.name in rows:  # a tied pipeline's last stage has the embedding under another name
            assert row == rows[row.name]
    masters = backend.masters.weights()
    for name, master in masters.items():
        tp_rank = backend.parallel.rank("etp" if ".experts." in name else "tp")
        assert backend.masters.layout(master) == forecast.layout(name, tp_rank), name
    planned = {(plan.ranks, len(plan.matrices)) for plan in forecast.plans}
    assert {(m.plan.ranks, len(m.plan.matrices)) for m in backend.optimizer.muons} <= planned
    parameters = list(backend.model.module.parameters())
    apart = {p.data_ptr() for p in parameters}
    state = backend.optimizer.state_tree()["state"].values()
    found = {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.main_grad.nbytes for p in parameters),
        "fp32 masters": sum(m.nbytes for m in masters.values() if m.data_ptr() not in apart),
        "optimizer state (fp32)": sum(t.nbytes for tensors in state for t in tensors.values()),
    }
    backend.close()
    return found | {"together": sum(found.values())}, forecast.memory()


@pytest.mark.parametrize(
    ("world", "megatron", "optimizer", "precision"),
    [
        (4, {TP: 2, PP: 2}, {}, "float32"),
        (4, {TP: 2}, {"optimizer": "dist_muon"}, "bfloat16"),
        # A pattern of the first stage alone.
        (4, {PP: 2, EXPERT: 2}, {"optimizer": "muon", "muon_exclude": (r"layers\.0\.self_at",)},
         "float32"),
        (2, {TP: 2} | SP, {"optimizer": "muon", "muon_tp_mode": "blockwise"}, "bfloat16"),
    ],
)  # fmt: skip
def test_ranks_hold_what_was_forecast_without_them(
    moe, pool, world, megatron, optimizer, precision
):
    layout = (SP if TP in megatron else {}) | megatron
    arguments = (str(moe), layout, optimizer, precision)
    results = pool(world).run(compare_with_forecast, *arguments, timeout_s=200)
    fullest = max((held for held, _ in results), key=lambda held: held["together"])
    assert fullest == results[0][1]


def half_a_run(pool, folder, backend, world, options):
    return over_ranks(pool(world).run(train, str(folder), backend, options, timeout_s=200))


DTENSOR = (2, {"dtensor_cfg": {}})
ACROSS = {
    "to TP 2": (DTENSOR, (2, {"megatron_cfg": {TP: 2}})),
    "to PP 2": (DTENSOR, (2, {"megatron_cfg": {PP: 2}})),
    "to DP 2, shared optimizer": (DTENSOR, (2, {"megatron_cfg": {}})),
    "from TP 4 over 2 key heads": ((4, {"megatron_cfg": {TP: 4}}), DTENSOR),
    "from TP 2 x PP 2": ((4, {"megatron_cfg": {TP: 2, PP: 2}}), DTENSOR),
    "from PP 2 to TP 2": ((2, {"megatron_cfg": {PP: 2}}), (2, {"megatron_cfg": {TP: 2}})),
}


@pytest.mark.parametrize("optimizer", ["adam", "dist_muon"])
@pytest.mark.parametrize("way", ACROSS)
def test_a_run_goes_on_across_backends_and_layouts(
    models,  # noqa: F811
    pool,
    alone,  # noqa: F811
    tmp_path,
    way,
    optimizer,
):
    (world, backend), (next_world, next_backend) = ACROSS[way]
    options = {"optimizer": {"optimizer": optimizer, "muon_bucket_mb": 0.02}}
    folder, saved = models / "qwen3", {"save": str(tmp_path)}
    half_a_run(pool, folder, backend, world, options | saved | {"steps": 4})
    loaded = {"load": str(tmp_path), "steps": 8}
    found = half_a_run(pool, folder, next_backend, next_world, options | loaded)
    expected = alone("qwen3", **options, steps=8)
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key][4:], abs=1e-6)
    for name, weight in expected["weights"].items():
        assert abs(found["weights"][name] - weight).max() < 1e-5, name
