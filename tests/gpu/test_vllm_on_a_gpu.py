"""vLLM on an NVIDIA GPU, beside others who use it: log-probabilities, sleep, and a whole run.

Written without one; skipped without one.
"""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from nemo_like.cluster.group import GroupConfig, WorkerGroup
from nemo_like.cluster.placement import place_single
from nemo_like.cluster.runtime import RayCluster, import_ray
from nemo_like.config.run import ClusterConfig
from nemo_like.errors import CheckpointError
from nemo_like.rollout.vllm import VLLMEngine
from nemo_like.rollout.vllm_settings import GPU_ENVIRONMENT, OnGpus
from nemo_like.types import Prompt, SamplingParams
from nemo_like.weight_sync.object_store import StoreSender

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

CONFIG = Qwen3Config(
    hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=320, head_dim=64,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    tie_word_embeddings=True,
)  # fmt: skip
PROMPTS = [Prompt(number, tuple(range(1, 4 + number)), "", "") for number in range(16)]
SAMPLING = SamplingParams(32, seed=7)
SHARE = 0.3


def words(token_ids):
    return " ".join(map(str, token_ids))


def newborn(seed):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).eval()


@dataclass(frozen=True)
class MakeEngine:
    eager: bool

    def __call__(self):
        where = OnGpus(SHARE, eager=self.eager, sleeps=True)
        options = {"max_model_len": 256, "dtype": torch.bfloat16, "where": where}
        return VLLMEngine(CONFIG.to_dict(), words, **options)


@pytest.fixture(scope="module")
def cluster():
    import_ray().cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = RayCluster(ClusterConfig(gpus_per_node=1))
    cluster.start()
    yield cluster
    cluster.close()


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "graphs"])
def engine(request, cluster, tmp_path_factory):
    folder, make = tmp_path_factory.mktemp("engine"), MakeEngine(request.param)
    config = GroupConfig(
        "engine", place_single(uses_gpu=True), make, folder, 600.0, GPU_ENVIRONMENT
    )
    group = WorkerGroup(cluster, config)
    group.start()
    yield group
    group.close()


def load(engine, seed, version):
    weights = newborn(seed).state_dict()
    del weights["lm_head.weight"]  # tied, as a policy exports it
    parcel = engine.put(StoreSender().send(list(weights.items())))
    return engine.feed("load_weights", [[parcel]], version=version)[0]


def mean_gap(engine, seed):
    """Between the engine's log-probabilities and those of the fp32 model; nats."""
    model, gaps = newborn(seed), []
    for rollout in engine.call_each("generate", [(PROMPTS, SAMPLING, None)])[0]:
        start = len(rollout.prompt.token_ids)
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        with torch.no_grad():
            expected = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        picked = expected.gather(1, ids[0, start:, None])[:, 0]
        gaps.append((picked - torch.tensor(rollout.logprobs)).abs())
    return float(torch.cat(gaps).mean())


def used_bytes():
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_it_is_born_asleep_draws_what_it_was_given_and_again_after_every_sleep(engine):
    engine.wait_ready()
    asleep = used_bytes()
    with pytest.raises(CheckpointError, match="no complete weights"):
        engine.call_each("generate", [(PROMPTS, SAMPLING, None)])
    total = torch.cuda.get_device_properties(0).total_memory
    for version, seed in enumerate((0, 0, 1), start=1):
        load(engine, seed, version)
        assert used_bytes() - asleep > SHARE / 2 * total
        assert mean_gap(engine, seed) < 0.02
        assert mean_gap(engine, 2) > 0.02  # the measure sees other weights
        engine.call_all("sleep")
        assert used_bytes() - asleep < 1 << 30


@pytest.mark.parametrize("transport", ["ipc", "object_store"])
def test_a_run_of_grpo_shares_its_gpu_between_policy_and_engine(transport, tmp_path):
    command = [
        sys.executable, "examples/run_grpo.py", "cluster.gpus_per_node=1",
        "policy.init=random", "policy.sft_config=null", "grpo.max_num_steps=3",
        "policy.generation.vllm_cfg.gpu_memory_utilization=0.3",
        f"policy.generation.refit_transport={transport}",
        f"logger.log_dir={tmp_path / 'logs'}", f"checkpointing.checkpoint_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [json.loads(line) for line in next(tmp_path.rglob("metrics.jsonl")).open()]
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 3
