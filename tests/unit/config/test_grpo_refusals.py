"""Settings of a GRPO run that contradict each other are refused before anything starts."""

from __future__ import annotations

import pytest

from nemo_like.config.grpo import GRPOTree

GEN = "policy.generation"
CALLS_END = f"{GEN}.stop_strings=['</calc>']"
APART = f"{GEN}.colocated.enabled=false"
OWN = f"{GEN}.colocated.resources"
SHAPE = "grpo.reward_shaping"
KL = "loss_fn.reference_policy_kl_penalty"
TIS = "loss_fn.truncated_importance_sampling"

TYPOS = {
    "grpo.num_generation_per_prompt": "grpo.num_generations_per_prompt",
    "grpo.use_dynamic_samplings": "grpo.use_dynamic_sampling",
    "grpo.reward_shaping.overlong_buffer": "grpo.reward_shaping.overlong_buffer_length",
    "loss_fn.ratio_clip_maximum": "loss_fn.ratio_clip_max",
    f"{GEN}.temprature": f"{GEN}.temperature",
    f"{GEN}.vllm_cfg.gpu_memory_utilisation": f"{GEN}.vllm_cfg.gpu_memory_utilization",
    "env.math.num_worker": "env.math.num_workers",
}


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_an_unknown_key_is_refused_with_the_nearest_spelling(grpo_refused, typo, meant):
    assert f"did you mean {meant}" in grpo_refused(f"++{typo}=1")


WRONG_VALUES = {
    "grpo.num_prompts_per_step=0": "int > 0",
    "grpo.batch_multiplier=0.5": "float >= 1",
    "grpo.on_starvation=go_on": "raise | stop | train_on_kept",
    "grpo.adv_estimator.name=gdpo": "one reward, not several",
    "loss_fn.reference_policy_kl_type=k9": "k1 | k2 | k3",
    f"{GEN}.temperature=0": "float > 0",
    f"{GEN}.top_p=0": "float > 0",
    f"{GEN}.backend=sglang": "drawn by vllm, or by hf",
    f"{GEN}.mismatch.max_token_mult_prob_error=1": "float > 1",
    "data.train.env_name=judge": "arithmetic | math | calculator | custom",
    "env.custom.reward=my_rewards.py": "package.module:function",
    "env.math.math_verify_impl=exact": "hf_math_verify | dapo_math_verify",
    "policy.model_name=Qwen/Qwen3-0.6B": "--config configs/grpo_math_1B.yaml",
    "sft.seed=1": "no such key",
}


@pytest.mark.parametrize(("override", "allowed"), WRONG_VALUES.items())
def test_a_wrong_value_is_refused_with_what_is_allowed(grpo_refused, override, allowed):
    report = grpo_refused(override)
    assert allowed in report
    assert report.startswith("1 problem ")


CONFLICTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no whole number of updates": (
        ("policy.train_global_batch_size=100",),
        (
            "policy.train_global_batch_size",
            "grpo.num_prompts_per_step",
            "grpo.num_generations_per_prompt",
        ),
    ),
    "more than a step has": (
        ("policy.train_global_batch_size=512",),
        ("policy.train_global_batch_size", "grpo.num_prompts_per_step"),
    ),
    "ratio 1 and two updates": (
        ("policy.train_global_batch_size=128", "loss_fn.force_on_policy_ratio=true"),
        ("loss_fn.force_on_policy_ratio", "policy.train_global_batch_size"),
    ),
    "a group of one": (
        ("grpo.num_generations_per_prompt=1", "grpo.num_prompts_per_step=256"),
        ("grpo.num_generations_per_prompt", "grpo.adv_estimator.name"),
    ),
    "a group of one with a baseline": (
        (
            "grpo.num_generations_per_prompt=1",
            "grpo.num_prompts_per_step=256",
            "grpo.adv_estimator.name=reinforce_plus_plus",
        ),
        ("grpo.num_generations_per_prompt", "grpo.adv_estimator.minus_baseline"),
    ),
    "a group of one under dynamic sampling": (
        (
            "grpo.num_generations_per_prompt=1",
            "grpo.num_prompts_per_step=256",
            "grpo.adv_estimator={name: reinforce_plus_plus, minus_baseline: false}",
            "grpo.use_dynamic_sampling=true",
        ),
        ("grpo.num_generations_per_prompt", "grpo.use_dynamic_sampling"),
    ),
    "the deviation of one other": (
        ("grpo.num_generations_per_prompt=2", "grpo.num_prompts_per_step=128"),
        (
            "grpo.num_generations_per_prompt",
            "grpo.use_leave_one_out_baseline",
            "grpo.normalize_rewards",
        ),
    ),
    "GRPO without a baseline": (
        ("grpo.adv_estimator.minus_baseline=false",),
        ("grpo.adv_estimator.minus_baseline", "grpo.adv_estimator.name"),
    ),
    "more prompts without dynamic sampling": (
        ("grpo.batch_multiplier=3",),
        ("grpo.batch_multiplier", "grpo.use_dynamic_sampling"),
    ),
    "advantages between nothing": (
        ("grpo.advantage_clip_low=1", "grpo.advantage_clip_high=-1"),
        ("grpo.advantage_clip_low", "grpo.advantage_clip_high"),
    ),
    "rewards between nothing": (
        ("grpo.reward_scaling.source_min=1",),
        ("grpo.reward_scaling.source_min", "grpo.reward_scaling.source_max"),
    ),
    "ahead without correction": (
        ("grpo.async_grpo.enabled=true", APART),
        ("grpo.async_grpo.enabled", "loss_fn.use_importance_sampling_correction"),
    ),
    "ahead on shared GPUs": (
        ("grpo.async_grpo.enabled=true", "loss_fn.use_importance_sampling_correction=true"),
        ("grpo.async_grpo.enabled", f"{GEN}.colocated.enabled"),
    ),
    "ahead under dynamic sampling": (
        (
            "grpo.async_grpo.enabled=true",
            APART,
            "loss_fn.use_importance_sampling_correction=true",
            "grpo.use_dynamic_sampling=true",
        ),
        ("grpo.async_grpo.enabled", "grpo.use_dynamic_sampling"),
    ),
    "KL in the reward of GRPO": (
        ("loss_fn.use_kl_in_reward=true", f"{KL}=0.01"),
        ("loss_fn.use_kl_in_reward", "grpo.adv_estimator.name"),
    ),
    "engine longer than sequences": (
        (f"{GEN}.vllm_cfg.max_model_len=512",),
        (f"{GEN}.vllm_cfg.max_model_len", "policy.max_total_sequence_length"),
    ),
    "response longer than sequences": (
        (f"{GEN}.max_new_tokens=257",),
        (f"{GEN}.max_new_tokens", "policy.max_total_sequence_length"),
    ),
    "response longer than the engine's sequences": (
        (f"{GEN}.vllm_cfg.max_model_len=32",),
        (f"{GEN}.max_new_tokens", f"{GEN}.vllm_cfg.max_model_len"),
    ),
    "prompt longer than sequences": (
        ("data.max_input_seq_length=257",),
        ("data.max_input_seq_length", "policy.max_total_sequence_length"),
    ),
    "prompt longer than the engine's sequences": (
        ("data.max_input_seq_length=200", f"{GEN}.vllm_cfg.max_model_len=100"),
        ("data.max_input_seq_length", f"{GEN}.vllm_cfg.max_model_len"),
    ),
    "penalty beyond the end": (
        (f"{SHAPE}.enabled=true", f"{SHAPE}.max_response_length=65"),
        (f"{SHAPE}.max_response_length", f"{GEN}.max_new_tokens"),
    ),
    "penalty where nobody knows": (
        (f"{SHAPE}.enabled=true", f"{GEN}.max_new_tokens=null"),
        (f"{SHAPE}.max_response_length", f"{GEN}.max_new_tokens"),
    ),
    "penalty before the beginning": (
        (f"{SHAPE}.enabled=true", f"{SHAPE}.overlong_buffer_length=65"),
        (f"{SHAPE}.overlong_buffer_length", f"{SHAPE}.max_response_length"),
    ),
    "an empty text that ends": (
        (f"{GEN}.stop_strings=[x,'']",),
        (f"{GEN}.stop_strings",),
    ),
    "IPC between GPUs": (
        ("cluster.gpus_per_node=8", f"{GEN}.refit_transport=ipc", APART, f"{OWN}.gpus_per_node=2"),
        (f"{GEN}.refit_transport", f"{GEN}.colocated.enabled"),
    ),
    "broadcast on one GPU": (
        ("cluster.gpus_per_node=8", f"{GEN}.refit_transport=broadcast"),
        (f"{GEN}.refit_transport", f"{GEN}.colocated.enabled"),
    ),
    "vLLM without Ray": (
        ("cluster.launcher=local",),
        (f"{GEN}.backend", "cluster.launcher"),
    ),
    "several engines in one process": (
        ("cluster.launcher=local", f"{GEN}.backend=hf", f"{GEN}.num_cpu_engines=2"),
        (f"{GEN}.num_cpu_engines", "cluster.launcher"),
    ),
    "GPUs of a CPU machine": (
        ("cluster.gpus_per_node=0", APART, f"{OWN}.gpus_per_node=1"),
        (f"{OWN}.gpus_per_node", "cluster.gpus_per_node"),
    ),
    "shared memory between machines": (
        ("cluster.gpus_per_node=0", "cluster.num_nodes=2", f"{GEN}.refit_transport=ipc"),
        (f"{GEN}.refit_transport", "cluster.num_nodes"),
    ),
    "a direct way between GPU and CPU": (
        ("cluster.gpus_per_node=8", f"{GEN}.backend=hf", f"{GEN}.refit_transport=ipc"),
        (f"{GEN}.refit_transport", f"{GEN}.backend"),
    ),
    "a direct way to an engine of two GPUs": (
        (
            "cluster.gpus_per_node=8",
            f"{GEN}.refit_transport=ipc",
            f"{GEN}.vllm_cfg.tensor_parallel_size=2",
        ),
        (f"{GEN}.refit_transport", f"{GEN}.vllm_cfg.tensor_parallel_size"),
    ),
    "a transport in one process": (
        ("cluster.launcher=local", f"{GEN}.backend=hf", f"{GEN}.refit_transport=ipc"),
        (f"{GEN}.refit_transport", "cluster.launcher"),
    ),
    "tensor parallel on a CPU": (
        ("cluster.gpus_per_node=0", f"{GEN}.vllm_cfg.tensor_parallel_size=2"),
        (f"{GEN}.vllm_cfg.tensor_parallel_size", "cluster.gpus_per_node"),
    ),
    "CPU engines on GPUs": (
        ("cluster.gpus_per_node=8", f"{GEN}.num_cpu_engines=2"),
        (f"{GEN}.num_cpu_engines", "cluster.gpus_per_node"),
    ),
    "engine across machines": (
        ("cluster.gpus_per_node=8", f"{GEN}.vllm_cfg.tensor_parallel_size=16"),
        (f"{GEN}.vllm_cfg.tensor_parallel_size", "cluster.gpus_per_node"),
    ),
    "engine in a part of a machine": (
        (
            "cluster.gpus_per_node=8",
            APART,
            f"{OWN}.gpus_per_node=3",
            f"{GEN}.vllm_cfg.tensor_parallel_size=2",
        ),
        (f"{GEN}.vllm_cfg.tensor_parallel_size", "cluster.gpus_per_node"),
    ),
    "shared GPUs and own ones": (
        ("cluster.gpus_per_node=8", f"{OWN}.gpus_per_node=2"),
        (f"{OWN}.gpus_per_node", f"{GEN}.colocated.enabled"),
    ),
    "own GPUs, and none said": (
        ("cluster.gpus_per_node=8", APART),
        (f"{GEN}.colocated.enabled", f"{OWN}.gpus_per_node", "cluster.gpus_per_node"),
    ),
    "all GPUs the engines'": (
        ("cluster.gpus_per_node=8", APART, f"{OWN}.gpus_per_node=8"),
        (f"{OWN}.gpus_per_node", "cluster.gpus_per_node"),
    ),
    "parts of several machines": (
        (
            "cluster.num_nodes=2",
            "cluster.gpus_per_node=8",
            APART,
            f"{OWN}={{num_nodes: 1, gpus_per_node: 4}}",
        ),
        (f"{GEN}.colocated.enabled", f"{OWN}.num_nodes", "cluster.num_nodes"),
    ),
    "a layout of the policy's part": (
        (
            "cluster.gpus_per_node=8",
            APART,
            f"{OWN}.gpus_per_node=3",
            "policy.dtensor_cfg.tensor_parallel_size=2",
        ),
        ("policy.dtensor_cfg.tensor_parallel_size", "cluster.gpus_per_node"),
    ),
    "newborn and fine-tuned": (
        ("policy.init=random",),
        ("policy.sft_config", "policy.init"),
    ),
    "a reward that nobody names": (
        ("data.train.env_name=custom",),
        ("env.custom.reward", "data.train.env_name"),
    ),
    "a calculator whose result is not read": (
        ("data.validation.env_name=calculator", CALLS_END),
        ("grpo.max_rollout_turns", "data.validation.env_name"),
    ),
    "a calculator whose calls do not end": (
        ("data.train.env_name=calculator", "grpo.max_rollout_turns=2"),
        (f"{GEN}.stop_strings", "data.train.env_name"),
    ),
    "replies that nobody reads": (
        ("data.default.env_name=custom", "env.custom.reward=a:b", "env.custom.reply=a:c"),
        ("grpo.max_rollout_turns", "env.custom.reply"),
    ),
    "turns without replies": (
        ("grpo.max_rollout_turns=2",),
        ("grpo.max_rollout_turns", "data.default.env_name"),
    ),
    "nothing to rank by": (
        ("data.validation=null",),
        ("checkpointing.metric_name", "data.validation", "grpo.val_period"),
    ),
    "warm-up and run": (
        ("grpo.max_num_steps=2", "policy.scheduler.lr_warmup_iters=9"),
        ("policy.scheduler.lr_warmup_iters", "grpo.max_num_steps"),
    ),
    "GSPO per token": (
        ("loss_fn.sequence_level_importance_ratios=true",),
        ("loss_fn.sequence_level_importance_ratios", "loss_fn.token_level_loss"),
    ),
    "weights to limit without weights": (
        (f"{TIS}_ratio=2",),
        (f"{TIS}_type", "loss_fn.use_importance_sampling_correction"),
    ),
}


@pytest.mark.parametrize(("overrides", "keys"), CONFLICTS.values(), ids=CONFLICTS)
def test_values_that_do_not_go_together_are_refused_naming_every_key(grpo_refused, overrides, keys):
    report = grpo_refused(*overrides)
    assert report.startswith("1 problem ")
    for key in keys:
        assert f"  {key} = " in report


@pytest.mark.parametrize("judge", ["calculator", "custom"])
def test_fine_tuning_refuses_environments_that_it_can_not_ask(refused, judge):
    assert "judged by arithmetic or math" in refused(f"data.validation.env_name={judge}")


def test_every_default_is_valid():
    assert GRPOTree().updates_per_step == 1
