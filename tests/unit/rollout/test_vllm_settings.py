"""What vLLM is told, against what it knows; it is read, not imported."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from nemo_like.rollout.vllm_settings import GPU_ENVIRONMENT, OnCpu, OnGpus

CONFIG = Qwen3Config(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)


def vllm_source(name):
    spec = find_spec("vllm")
    if spec is None:
        pytest.skip("vLLM is not installed")
    return (Path(spec.origin).parent / name).read_text()


@pytest.mark.parametrize("where", [OnCpu(), OnGpus(0.5, num_parts=2)])
def test_every_argument_and_variable_is_one_that_vllm_has(where):
    (known,) = (
        node
        for node in ast.parse(vllm_source("engine/arg_utils.py")).body
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    names = {field.target.id for field in known.body if isinstance(field, ast.AnnAssign)}
    assert set(where.arguments(CONFIG, torch.float32, 64, 4)) <= names
    variables = {name for name in where.environment if name.startswith("VLLM")}
    assert all(f'"{name}"' in vllm_source("envs.py") for name in variables)


def test_an_engine_on_gpus_is_told_what_the_configuration_says():
    told = OnGpus(0.4, eager=True, sleeps=True).arguments(CONFIG, torch.bfloat16, 64, 4)
    assert (told["gpu_memory_utilization"], told["enforce_eager"]) == (0.4, True)
    assert told["enable_sleep_mode"] and "kv_cache_memory_bytes" not in told
    assert OnGpus.environment is GPU_ENVIRONMENT


def test_a_kv_cache_on_a_cpu_holds_all_sequences_and_a_block_more():
    of_a_token = 2 * CONFIG.num_hidden_layers * 32 * 4
    found = OnCpu().arguments(CONFIG, torch.float32, 200, 3)["kv_cache_memory_bytes"]
    assert found == of_a_token * (3 * 256 + 128)
    assert OnCpu(5).arguments(CONFIG, torch.float32, 200, 3)["kv_cache_memory_bytes"] == 5
