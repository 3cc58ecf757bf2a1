"""A GRPO config written for NeMo-RL means the same here, or is refused with the reason."""

from __future__ import annotations

import pytest

from nemo_like.config.absent import AS_IT_IS
from nemo_like.config.compat import DATASETS

INHERIT = "defaults: [grpo_math_1B, _self_]\n"

THEIRS = """
grpo:
  num_prompts_per_step: 32
  num_generations_per_prompt: 16
  max_rollout_turns: 1
  max_num_epochs: 1
  max_num_steps: 1000000
  normalize_rewards: true
  use_leave_one_out_baseline: true
  val_period: 10
  val_start_at: -1
  val_at_start: false
  val_at_end: false
  overlong_filtering: false
  advantage_clip_low: null
  advantage_clip_high: null
  max_val_samples: 256
  val_num_generations_per_prompt: 1
  stop_at_validation_metric: null
  stop_at_validation_threshold: null
  val_batch_size: 256
  seed: 42
  use_dynamic_sampling: false
  dynamic_sampling_max_gen_batches: 10
  batch_multiplier: 1
  reward_shaping:
    enabled: false
    overlong_buffer_length: 128
    overlong_buffer_penalty: 1
    max_response_length: ${policy.max_total_sequence_length}
    stop_properly_penalty_coef: null
  adv_estimator:
    name: grpo
    normalize_rewards: ${grpo.normalize_rewards}
    use_leave_one_out_baseline: ${grpo.use_leave_one_out_baseline}
    minus_baseline: true
  reward_scaling: {enabled: false, source_min: 0.0, source_max: 1.0, target_min: 0, target_max: 1}
  seq_logprob_error_threshold: null
  invalid_tool_call_advantage: null
  malformed_thinking_advantage: null
  async_grpo:
    enabled: false
    max_trajectory_age_steps: 1
    max_generation_failures: 0
    in_flight_weight_updates: false
    recompute_kv_cache_after_weight_updates: false
reward_penalties: {penalize_empty: false, penalize_tag: false, token_ids: null}
loss_fn:
  reference_policy_kl_penalty: 0.01
  reference_policy_kl_type: k3
  kl_input_clamp_value: 20.0
  kl_output_clamp_value: 10.0
  ratio_clip_min: 0.2
  ratio_clip_max: 0.2
  ratio_clip_c: null
  use_on_policy_kl_approximation: false
  use_importance_sampling_correction: false
  truncated_importance_sampling_type: null
  truncated_importance_sampling_ratio: null
  truncated_importance_sampling_ratio_min: null
  sequence_level_importance_ratios: false
  token_level_loss: true
  force_on_policy_ratio: false
  use_kl_in_reward: false
  use_cispo: false
  disable_ppo_ratio: false
  positive_example_nll_weight: 0
checkpointing: {checkpoint_dir: results/grpo, metric_name: "val:accuracy", higher_is_better: true,
  keep_top_k: 3, save_period: 10, model_save_format: safetensors, save_consolidated: false}
policy:
  model_name: Qwen/Qwen2.5-1.5B
  tokenizer: {name: "${policy.model_name}", chat_template_kwargs: null}
  train_global_batch_size: 512
  train_micro_batch_size: 4
  logprob_batch_size: ${policy.train_micro_batch_size}
  generation_batch_size: 32
  max_total_sequence_length: 512
  logprob_chunk_size: null
  hf_config_overrides: {}
  draft: {enabled: false, model_name: null, loss_weight: 0.1}
  sequence_packing:
    enabled: true
    train_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.train_micro_batch_size}}
    logprob_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.logprob_batch_size}}
  optimizer:
    name: torch.optim.AdamW
    kwargs: {lr: 5.0e-6, weight_decay: 0.01, betas: [0.9, 0.999], eps: 1e-8, fused: false}
  scheduler:
    - {name: torch.optim.lr_scheduler.LinearLR,
       kwargs: {start_factor: 0.1, end_factor: 1.0, total_iters: 50}}
    - {name: torch.optim.lr_scheduler.ConstantLR, kwargs: {factor: 1.0, total_iters: 10000000000}}
    - {milestones: [50]}
  generation:
    port_range_low: 3000
    port_range_high: 4999
    backend: vllm
    max_new_tokens: ${policy.max_total_sequence_length}
    temperature: 1.0
    top_p: 1.0
    top_k: null
    val_temperature: ${.temperature}
    stop_token_ids: null
    stop_strings: null
    refit_transport: null
    refit_cfg: {nixl: {num_threads: 4}}
    mcore_generation_config: {buffer_size_gb: 20}
    vllm_cfg:
      async_engine: false
      precision: ${policy.precision}
      kv_cache_dtype: auto
      logprobs_mode: processed_logprobs
      tensor_parallel_size: 1
      pipeline_parallel_size: 1
      expert_parallel_size: 1
      gpu_memory_utilization: 0.6
      max_model_len: ${policy.max_total_sequence_length}
      enforce_eager: false
      use_tqdm: true
      use_deep_gemm: false
      num_last_layers_in_bf16: 0
      num_first_layers_in_bf16: 0
      enable_vllm_metrics_logger: true
      vllm_metrics_logger_interval: 0.5
    vllm_kwargs: {}
    colocated: {enabled: true, resources: {gpus_per_node: null, num_nodes: null}}
data:
  max_input_seq_length: ${policy.max_total_sequence_length}
  use_multiple_dataloader: false
  train: {dataset_name: OpenMathInstruct-2, split_validation_size: 0.05, seed: "${grpo.seed}"}
  validation: null
  default: {prompt_file: examples/prompts/cot.txt, processor: math_hf_data_processor,
    env_name: math}
env: {math: {num_workers: 8, math_verify_impl: hf_math_verify}}
data_plane: {enabled: false, backend: x}
on_policy_distillation: null
cluster: {gpus_per_node: 1, num_nodes: 1, master_port_range_low: 1400}
"""


def test_a_whole_config_of_theirs_is_the_default_here(grpo, write):
    found = grpo("--config", write(THEIRS)).tree
    ours = grpo("--config", "configs/grpo_math_1B.yaml").tree
    shaping = ours.grpo.reward_shaping.model_copy(update={"max_response_length": 512})
    theirs = {"val_at_start": False, "val_at_end": False, "reward_shaping": shaping}
    assert found.grpo == ours.grpo.model_copy(update=theirs)
    assert (found.loss_fn, found.env) == (ours.loss_fn, ours.env)
    assert found.policy.max_new_tokens == ours.policy.max_new_tokens == 512
    assert found.policy.active_scheduler.lr_warmup_iters == 50
    for key in ("dataset_name", "split", "input_key", "output_key", "split_validation_size"):
        assert getattr(found.data.train, key) == getattr(ours.data.train, key)


def test_the_two_places_of_group_statistics_are_one(grpo):
    assert not grpo("grpo.adv_estimator.normalize_rewards=false").tree.grpo.normalize_rewards
    again = grpo("grpo.adv_estimator.normalize_rewards=false", "grpo.normalize_rewards=true")
    assert again.tree.grpo.normalize_rewards


def test_penalties_that_are_on_are_refused_and_those_that_are_off_are_not(grpo, grpo_refused):
    assert grpo("++reward_penalties={a: false, b: null}").notes == ()
    assert "env.custom.reward" in grpo_refused("++reward_penalties={a: false, b: true}")


def test_a_bound_of_importance_weights_alone_is_tis(grpo):
    bound = "loss_fn.truncated_importance_sampling_ratio=2"
    loss = grpo(bound, "loss_fn.use_importance_sampling_correction=true").tree.loss_fn
    assert loss.truncated_importance_sampling_type == "tis"


@pytest.mark.parametrize(("path", "value"), AS_IT_IS.items())
def test_asking_for_what_happens_anyway_is_no_request(grpo, grpo_refused, path, value):
    assert grpo(f"++{path}={value}").notes == ()
    assert "absent on purpose" in grpo_refused(f"++{path}=7")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("policy.generation.top_k=-1", lambda tree: tree.policy.generation.top_k is None),
        ("policy.generation.stop_strings=null", lambda t: t.policy.generation.stop_strings == ()),
        ("grpo.val_period=-1", lambda tree: tree.grpo.val_period == 0),
    ],
)
def test_their_numbers_for_off_and_all_are_understood(grpo, override, expected):
    assert expected(grpo(override).tree)


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_by_its_short_name_brings_its_columns(grpo, name):
    source = grpo(f"data.train={{dataset_name: {name}}}").tree.data.train
    expected = DATASETS[name]
    assert {key: getattr(source, key) for key in expected} == expected
    assert "/" in source.dataset_name
