"""The commands that users were promised, word for word."""

from __future__ import annotations

import shlex

import pytest

EMBEDDED = ""
MUON = "policy.optimizer.optimizer=muon"
MEGATRON_MUON = """
  policy.megatron_cfg.enabled=true policy.dtensor_cfg.enabled=false
  ++policy.megatron_cfg.optimizer.optimizer=dist_muon ++policy.megatron_cfg.optimizer.muon_scale_mode=spectral
  ++policy.megatron_cfg.optimizer.muon_momentum=0.9 ++policy.megatron_cfg.optimizer.muon_use_nesterov=False
  ++policy.megatron_cfg.optimizer.muon_extra_scale_factor=0.5
  policy.megatron_cfg.optimizer.use_precision_aware_optimizer=false policy.megatron_cfg.optimizer.use_distributed_optimizer=false
"""  # noqa: E501
QWEN3_235B = """
  --config examples/configs/sft_openmathinstruct2_megatron.yaml
  policy.megatron_cfg.enabled=true policy.dtensor_cfg.enabled=false ++policy.megatron_cfg.optimizer.optimizer=dist_muon
  ++policy.megatron_cfg.optimizer.muon_scale_mode=spectral ++policy.megatron_cfg.optimizer.muon_momentum=0.9
  ++policy.megatron_cfg.optimizer.muon_use_nesterov=False ++policy.megatron_cfg.optimizer.muon_extra_scale_factor=0.2
  policy.megatron_cfg.optimizer.use_precision_aware_optimizer=false ++policy.megatron_cfg.optimizer.lr=2e-5
  policy.megatron_cfg.optimizer.use_distributed_optimizer=False cluster.num_nodes=4 cluster.gpus_per_node=8
  policy.megatron_cfg.pipeline_model_parallel_size=8 policy.megatron_cfg.sequence_parallel=True
  policy.megatron_cfg.expert_model_parallel_size=8 policy.megatron_cfg.tensor_model_parallel_size=8
  policy.sequence_packing.enabled=True policy.model_name=Qwen/Qwen3-235B-A22B policy.tokenizer.name=Qwen/Qwen3-235B-A22B
  checkpointing.enabled=True cluster.num_nodes=16
  policy.megatron_cfg.num_layers_in_first_pipeline_stage=11 policy.megatron_cfg.num_layers_in_last_pipeline_stage=11
"""  # noqa: E501
TENSOR_PARALLEL = """
  cluster.num_nodes=1 cluster.gpus_per_node=0 cluster.cpu_workers_per_node=2
  policy.dtensor_cfg.tensor_parallel_size=2
"""


@pytest.mark.parametrize("command", [EMBEDDED, MUON, MEGATRON_MUON, QWEN3_235B, TENSOR_PARALLEL])
@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_the_commands_of_the_readme_are_valid(sft, command, option):
    assert sft(*shlex.split(command), *option).notes == ()


def test_the_muon_command_trains_with_muon_on_megatron(sft):
    policy = sft(*shlex.split(MEGATRON_MUON)).tree.policy
    optimizer = policy.active_optimizer
    assert policy.backend is policy.megatron_cfg
    assert optimizer.is_muon
    assert (optimizer.muon_momentum, optimizer.muon_extra_scale_factor) == (0.9, 0.5)
    assert optimizer.lr == policy.optimizer.lr


def test_the_235b_command_means_128_ranks_in_eight_stages(sft):
    tree = sft(*shlex.split(QWEN3_235B)).tree
    assert tree.cluster.world_size == 128
    assert tree.policy.backend.model_parallel_size == 64
    assert tree.policy.sequence_divisor == 8
    assert tree.policy.active_max_grad_norm is None
    assert tree.policy.active_optimizer.lr == 2e-5


def test_a_users_jsonl_is_named_on_the_default(sft, tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    tree = sft(
        *(f"data.train.data_path={tmp_path}/train.jsonl", "data.train.input_key=question"),
        *("data.train.output_key=answer", f"data.validation.data_path={tmp_path}/test.jsonl"),
        *("data.validation.input_key=question", "data.validation.output_key=answer"),
        "sft.max_num_steps=50",
    ).tree
    assert tree.data.train.output_key == "answer"
