"""Which engines a configuration gets; nothing is started."""

import pytest

from nemo_like.cluster.placement import Placement, RankPlace
from nemo_like.config.generation import RolloutPolicyConfig
from nemo_like.config.policy import PolicyConfig
from nemo_like.errors import ConfigError
from nemo_like.run.build import choose_engines
from nemo_like.weight_sync.broadcast import Broadcast
from nemo_like.weight_sync.ipc import Ipc

ON_CPU = Placement((RankPlace(0, 0, 0),), num_nodes=1, uses_gpu=False)
ON_GPU = Placement((RankPlace(0, 0, 0),), num_nodes=1, uses_gpu=True)


def policy(**generation):
    return RolloutPolicyConfig(model_name="tiny-qwen3", init="random", generation=generation)


def test_a_supervised_run_has_one_engine_that_answers():
    found = choose_engines(PolicyConfig(model_name="tiny-qwen3", init="random"), ON_GPU)
    assert (found.count, found.env_vars) == (1, {})


def test_vllm_engines_start_in_an_environment_of_their_own():
    found = choose_engines(policy(num_cpu_engines=3), ON_CPU)
    assert found.count == 3
    assert found.env_vars["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert choose_engines(policy(backend="hf", num_cpu_engines=2), ON_CPU).env_vars == {}


def test_vllm_on_gpus_is_refused_with_a_way_out():
    with pytest.raises(ConfigError, match=r"never tried on a GPU.*cluster\.gpus_per_node=0"):
        choose_engines(policy(), ON_GPU)


def test_weights_go_through_the_object_store_unless_another_way_is_asked_for():
    asked = {None: None, "object_store": None, "ipc": Ipc(), "broadcast": Broadcast()}
    for name, transport in asked.items():
        assert choose_engines(policy(refit_transport=name), ON_CPU).transport == transport


def test_a_direct_way_from_gpus_to_engines_on_cpus_is_refused():
    with pytest.raises(ConfigError, match="refit_transport=ipc: the policy is on GPUs and the eng"):
        choose_engines(policy(backend="hf", refit_transport="ipc"), ON_GPU)
