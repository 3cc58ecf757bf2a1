"""Which engines a configuration gets; nothing is started."""

import pytest

from nemo_like.cluster.placement import Placement, RankPlace
from nemo_like.config.generation import RolloutPolicyConfig
from nemo_like.config.policy import PolicyConfig
from nemo_like.errors import ConfigError
from nemo_like.run.build import choose_engines

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


@pytest.mark.parametrize("transport", ["cuda_ipc", "nccl"])
def test_transports_between_gpus_are_refused(transport):
    generation = policy(refit_transport=transport, colocated={"enabled": transport == "cuda_ipc"})
    with pytest.raises(ConfigError, match=f"refit_transport={transport} is between GPUs"):
        choose_engines(generation, ON_CPU)
