"""The commands for GRPO and DAPO that users were promised, word for word, and what they mean."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_like.config.command_line import to_yaml

ROOT = Path(__file__).parents[3]
CONFIGS = (
    "grpo_math.yaml",
    "dapo_math.yaml",
    "grpo_calculator.yaml",
    "grpo_math_1B.yaml",
    "recipes/llm/dapo-qwen2.5-7b.yaml",
    "recipes/llm/dapo-qwen2.5-7b.v2.yaml",
)
RECIPE = "--config examples/configs/recipes/llm/dapo-qwen2.5-7b.yaml"
DAPO_MUON = f"""
  {RECIPE}
  policy.megatron_cfg.enabled=true policy.dtensor_cfg.enabled=false ++policy.megatron_cfg.optimizer.optimizer=dist_muon
  ++policy.megatron_cfg.optimizer.muon_scale_mode=spectral ++policy.megatron_cfg.optimizer.muon_momentum=0.9
  ++policy.megatron_cfg.optimizer.muon_use_nesterov=False ++policy.megatron_cfg.optimizer.muon_extra_scale_factor=0.5
  policy.megatron_cfg.optimizer.use_precision_aware_optimizer=false policy.megatron_cfg.optimizer.use_distributed_optimizer=False
  cluster.num_nodes=16 cluster.gpus_per_node=8 policy.sequence_packing.enabled=True ~checkpointing.model_save_format
"""  # noqa: E501
ALSO = {
    "newer names": DAPO_MUON.replace(".yaml", ".v2.yaml").replace("muon_use_", "muon_"),
    "muon": "policy.optimizer.optimizer=muon",
    "engines of their own": f"{RECIPE} policy.generation.colocated.enabled=false "
    "policy.generation.colocated.resources.num_nodes=4 policy.train_global_batch_size=1024",
    "one step ahead": "policy.generation.colocated.enabled=false grpo.async_grpo.enabled=true "
    "loss_fn.use_importance_sampling_correction=true cluster.gpus_per_node=0",
    "GSPO": "loss_fn.sequence_level_importance_ratios=true loss_fn.token_level_loss=false",
    "RLOO": "grpo.normalize_rewards=false",
    "Dr.GRPO": "grpo.normalize_rewards=false grpo.use_leave_one_out_baseline=false",
    "Reinforce++": "grpo.adv_estimator.name=reinforce_plus_plus loss_fn.use_kl_in_reward=true "
    "loss_fn.reference_policy_kl_penalty=0.001 grpo.adv_estimator.minus_baseline=false",
    "a machine without vLLM": "policy.generation.backend=hf cluster.launcher=local",
    "a reward of one's own": "data.default.env_name=custom env.custom.reward=mine.rewards:short",
    "a calculator": "data.default.env_name=calculator grpo.max_rollout_turns=3 "
    "'policy.generation.stop_strings=[\"</calc>\"]'",
    "replies of one's own": "data.default.env_name=custom env.custom.reward=mine.rewards:short "
    "env.custom.reply=mine.rewards:hint grpo.max_rollout_turns=2",
}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_is_valid_and_survives_being_written_and_read(grpo, config, tmp_path):
    tree = grpo("--config", f"configs/{config}").tree
    (tmp_path / "again.yaml").write_text(to_yaml(tree))
    assert grpo("--config", str(tmp_path / "again.yaml")).tree == tree


@pytest.mark.parametrize("command", ["", DAPO_MUON, *ALSO.values()], ids=["", "DAPO", *ALSO])
def test_the_commands_are_valid(grpo, command):
    assert grpo(*shlex.split(command), "--dry-run").notes == ()


def test_the_dapo_command_trains_with_muon_on_128_ranks(grpo):
    tree = grpo(*shlex.split(DAPO_MUON)).tree
    policy = tree.policy
    assert policy.backend is policy.megatron_cfg
    assert (tree.training_cluster.world_size, policy.backend.model_parallel_size) == (128, 16)
    optimizer = policy.active_optimizer
    assert optimizer.is_muon
    assert (optimizer.lr, optimizer.weight_decay, optimizer.muon_momentum) == (1e-6, 0.1, 0.9)
    schedule = policy.active_scheduler
    assert (schedule.lr_warmup_iters, schedule.lr_warmup_init) == (10, 1e-7)
    assert policy.sequence_divisor == 8  # of Megatron's TP 4 and CP 2: nothing of the idle backend


def test_deleting_a_key_that_is_null_returns_it_to_its_default(grpo):
    assert grpo(*shlex.split(RECIPE)).tree.checkpointing.model_save_format is None
    assert grpo(*shlex.split(DAPO_MUON)).tree.checkpointing.model_save_format == "safetensors"


def test_the_recipe_is_dapo_as_it_is_known(grpo):
    tree = grpo(*shlex.split(RECIPE)).tree
    grpo_, loss = tree.grpo, tree.loss_fn
    assert grpo_.is_dapo
    assert (grpo_.num_prompts_per_step, grpo_.num_generations_per_prompt) == (512, 16)
    assert (tree.updates_per_step, grpo_.batch_multiplier) == (16, 3)
    assert (loss.ratio_clip_min, loss.ratio_clip_max, loss.ratio_clip_c) == (0.2, 0.28, 10)
    assert not loss.needs_reference
    assert grpo_.reward_scaling.target_min == -1
    assert (grpo_.reward_shaping.max_response_length, tree.policy.max_new_tokens) == (14336, 16384)
    assert tree.data.train.prompt_file is None and tree.data.default.prompt_file is None


def test_the_two_names_of_the_recipe_are_one_configuration(grpo):
    names = (f"recipes/llm/dapo-qwen2.5-7b{version}.yaml" for version in ("", ".v2"))
    one, other = (grpo("--config", name).tree for name in names)
    assert one == other


def test_the_embedded_default_is_grpo_from_the_weights_of_the_embedded_sft_run(grpo, sft):
    tree, before = grpo().tree, sft().tree
    assert not tree.grpo.is_dapo
    assert sft("--config", tree.policy.sft_config).tree == before
    assert tree.policy.model_name == before.policy.model_name
    assert tree.data.train.dataset_name == before.data.train.dataset_name == "arithmetic"
    assert tree.updates_per_step == 1


@pytest.mark.parametrize(
    "override",
    ["grpo.use_dynamic_sampling=true", "grpo.reward_shaping.enabled=true"],
)
def test_dynamic_sampling_and_overlong_shaping_make_a_run_dapo(grpo, override):
    assert grpo(override).tree.grpo.is_dapo


def test_engines_of_their_own_leave_the_policy_the_other_machines(grpo):
    own = "policy.generation.colocated.enabled=false"
    resources = "policy.generation.colocated.resources"
    several = grpo(
        "cluster.num_nodes=4", "cluster.gpus_per_node=8", own, f"{resources}.num_nodes=1"
    ).tree
    assert several.training_cluster.world_size == 24
    one = grpo("cluster.gpus_per_node=8", own, f"{resources}.gpus_per_node=2").tree
    assert one.training_cluster.world_size == 6
    assert one.cluster.world_size == 8


def test_what_makes_another_run_gets_another_checkpoint_folder(grpo):
    def folder(*overrides: str) -> str:
        return grpo(*overrides).tree.checkpointing.checkpoint_dir

    same = ("grpo.max_num_steps=7", "grpo.val_period=3", "policy.generation.max_num_seqs=8")
    assert {folder(text) for text in same} == {folder()}
    others = (
        "grpo.seed=1",
        "grpo.normalize_rewards=false",
        "grpo.async_grpo.max_trajectory_age_steps=2",
        "loss_fn.ratio_clip_max=0.3",
        "policy.generation.temperature=0.9",
        "policy.sft_config=null",
        "env.math.math_verify_impl=dapo_math_verify",
    )
    assert len({folder(), *(folder(text) for text in others)}) == 1 + len(others)


@pytest.mark.parametrize("script", ["run_grpo.py", "run_grpo_math.py"])
def test_the_scripts_answer_without_torch_from_anywhere(script, tmp_path):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--print-config"]
sys.path.insert(0, {str(ROOT / "examples")!r})
try:
    runpy.run_path({str(ROOT / "examples" / script)!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
assert not {{"torch", "ray", "vllm", "transformers"}} & set(sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert "sft_config: configs/sft_tiny.yaml" in found.stdout
