"""Which engines a configuration gets, and where; nothing is started."""

import pytest

from nemo_like.cluster.placement import Placement, RankPlace
from nemo_like.config.generation import RolloutPolicyConfig
from nemo_like.config.policy import PolicyConfig
from nemo_like.errors import ConfigError
from nemo_like.run.engines import choose_engines
from nemo_like.weight_sync.broadcast import Broadcast
from nemo_like.weight_sync.ipc import Ipc


def workers(count, *, nodes=1, on_gpu=True):
    ranks = (RankPlace(rank, rank * nodes // count, rank) for rank in range(count))
    return Placement(tuple(ranks), num_nodes=nodes, uses_gpu=on_gpu)


ON_CPU, ON_GPU = workers(1, on_gpu=False), workers(8)
APART = {"enabled": False, "resources": {"gpus_per_node": 2}}


def policy(**generation):
    return RolloutPolicyConfig(model_name="tiny-qwen3", init="random", generation=generation)


def test_a_supervised_run_has_one_engine_that_answers_and_it_is_on_a_cpu():
    supervised = PolicyConfig(model_name="tiny-qwen3", init="random")
    found = choose_engines(supervised, ON_GPU, ON_GPU)
    assert (found.count, found.env_vars, found.place.uses_gpu) == (1, {}, False)


def test_vllm_engines_start_in_an_environment_of_their_own():
    found = choose_engines(policy(num_cpu_engines=3), ON_CPU, ON_CPU)
    assert found.count == 3
    assert found.env_vars["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "TORCH_COMPILE_DISABLE" in found.env_vars
    reference = policy(backend="hf", num_cpu_engines=2)
    assert choose_engines(reference, ON_CPU, ON_CPU).env_vars == {}
    on_gpu = choose_engines(policy(), ON_GPU, ON_GPU).env_vars
    assert "TORCH_COMPILE_DISABLE" not in on_gpu  # CUDA graphs are compiled


def test_engines_beside_the_policy_have_no_gpus_of_their_own_and_sleep():
    found = choose_engines(policy(), ON_GPU, ON_GPU)
    assert (found.count, found.shares_gpus, found.factory.sleeps) == (8, True, True)
    assert found.place.uses_gpu and found.place.bundles == [{"CPU": 1.0}]
    assert found.transport == Ipc()


def test_engines_apart_have_the_gpus_that_the_policy_leaves_and_never_sleep():
    found = choose_engines(policy(colocated=APART), ON_GPU, workers(6))
    assert (found.count, found.shares_gpus, found.factory.sleeps) == (2, False, False)
    assert found.place.bundles == [{"CPU": 1.0, "GPU": 1.0}]
    assert found.transport == Broadcast()


def test_engines_of_whole_machines_are_counted_by_gpu():
    apart = {"enabled": False, "resources": {"num_nodes": 1}}
    found = choose_engines(policy(colocated=apart), workers(12, nodes=3), workers(8, nodes=2))
    assert found.count == 4


def test_engines_that_nothing_trains_beside_have_all_gpus_and_never_sleep():
    for colocated in ({}, APART):
        found = choose_engines(policy(colocated=colocated), ON_GPU, None)
        assert (found.count, found.shares_gpus) == (8, False)
        assert found.place.worker_resources["GPU"] == 1


def test_engines_without_any_gpu_are_refused_with_the_keys():
    with pytest.raises(ConfigError, match=r"the 0 GPU.*resources.*cluster\.gpus_per_node"):
        choose_engines(policy(colocated={"enabled": False}), ON_GPU, ON_GPU)


def test_an_engine_of_several_gpus_takes_weights_through_the_object_store():
    pairs = {"tensor_parallel_size": 2}
    beside = choose_engines(policy(vllm_cfg=pairs), ON_GPU, ON_GPU)
    assert (beside.count, beside.gpus_each, beside.place.bundles) == (4, 2, [{"CPU": 1.0}])
    apart = choose_engines(policy(vllm_cfg=pairs, colocated=APART), ON_GPU, workers(6))
    assert (apart.count, apart.place.worker_resources["GPU"]) == (1, 2)
    assert beside.transport is None and apart.transport is None


def test_weights_of_a_cpu_go_through_the_object_store_unless_another_way_is_asked_for():
    asked = {None: None, "object_store": None, "ipc": Ipc(), "broadcast": Broadcast()}
    for name, transport in asked.items():
        found = choose_engines(policy(refit_transport=name), ON_CPU, ON_CPU)
        assert found.transport == transport
    on_gpu = choose_engines(policy(refit_transport="object_store"), ON_GPU, ON_GPU)
    assert on_gpu.transport is None


def test_a_direct_way_from_gpus_to_engines_on_cpus_is_refused():
    with pytest.raises(ConfigError, match="refit_transport=ipc: the policy is on GPUs and the eng"):
        choose_engines(policy(backend="hf", refit_transport="ipc"), ON_GPU, ON_GPU)
    assert choose_engines(policy(backend="hf"), ON_GPU, ON_GPU).transport is None
