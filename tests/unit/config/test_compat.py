"""Configs written for NeMo-RL mean the same here, or are refused with the reason."""

from __future__ import annotations

import re

import pytest

from nemo_like.config.absent import ABSENT, FALSE_IS_A_CHOICE, IGNORED
from nemo_like.config.compat import MOVED
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.schema import known_paths
from nemo_like.config.sft import SFTTree

INHERIT = "defaults: [sft, _self_]\n"

THEIRS = """
sft: {max_num_epochs: 1, max_num_steps: 60, val_period: 10, val_batches: -1, seed: 42}
checkpointing:
  enabled: true
  metric_name: "val:val_loss"
  keep_top_k: 3
policy:
  model_name: meta-llama/Llama-3.2-1B
  tokenizer: {name: "${policy.model_name}", chat_template_kwargs: null, use_fastokens: false}
  train_global_batch_size: 32
  train_micro_batch_size: 1
  max_total_sequence_length: 1024
  precision: bfloat16
  offload_optimizer_for_logprob: false
  dtensor_cfg:
    _v2: true
    enabled: true
    env_vars: {}
    cpu_offload: false
    custom_parallel_plan: null
    automodel_kwargs: {}
    lora_cfg: {enabled: false, target_modules: [], dim: 8, alpha: 32, lora_A_init: xavier}
  dynamic_batching:
    enabled: false
    train_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.train_micro_batch_size}}
    sequence_length_round: 64
  sequence_packing:
    enabled: false
    train_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.train_micro_batch_size}}
    algorithm: modified_first_fit_decreasing
    sequence_length_round: 64
  make_sequence_length_divisible_by: ${policy.dtensor_cfg.tensor_parallel_size}
  max_grad_norm: 1.0
  optimizer:
    name: torch.optim.AdamW
    kwargs: {lr: 5.0e-6, weight_decay: 0.1, betas: [0.9, 0.98], eps: 1e-5, foreach: false}
  megatron_cfg:
    enabled: false
    empty_unused_memory_level: 1
    cuda_graph_impl: none
    peft: {enabled: false, dim: 8, lora_dtype: None}
    optimizer:
      optimizer: adam
      lr: 5.0e-6
      min_lr: 4.9999e-6
      bf16: true
      fp16: false
      params_dtype: float32
      use_distributed_optimizer: true
      use_precision_aware_optimizer: true
      clip_grad: ${policy.max_grad_norm}
      optimizer_cpu_offload: false
      optimizer_offload_fraction: 0.0
    scheduler:
      start_weight_decay: ${policy.megatron_cfg.optimizer.weight_decay}
      end_weight_decay: ${policy.megatron_cfg.optimizer.weight_decay}
      lr_decay_iters: 1000
      lr_warmup_iters: 50
      lr_warmup_init: 4.9999e-6
    distributed_data_parallel_config: {grad_reduce_in_fp32: false, use_custom_fsdp: false}
    fp8_cfg: {enabled: false, fp8: e4m3}
data:
  max_input_seq_length: ${policy.max_total_sequence_length}
  num_workers: 1
  train:
    dataset_name: OpenMathInstruct-2
    output_key: generated_solution
    split: train_1M
    split_validation_size: 0.05
  validation: null
  default: {prompt_file: null, processor: sft_processor}
logger:
  log_dir: logs
  wandb_enabled: false
  swanlab_enabled: false
  monitor_gpus: true
  wandb: {project: sft-dev, name: sft}
  gpu_monitoring: {collection_interval: 10}
cluster: {gpus_per_node: 1, num_nodes: 1, segment_size: null}
"""


def test_a_whole_config_of_theirs_is_understood(sft, write):
    found = sft("--config", write(THEIRS))
    policy, data = found.tree.policy, found.tree.data
    optimizer = policy.optimizer
    assert (optimizer.optimizer, optimizer.lr, optimizer.weight_decay) == ("adam", 5e-6, 0.1)
    assert (optimizer.adam_beta2, optimizer.adam_eps) == (0.98, 1e-5)
    assert policy.dynamic_batching.train_mb_tokens == 1024
    assert data.train.dataset_name == "nvidia/OpenMathInstruct-2"
    assert (data.train.input_key, data.train.output_key) == ("problem", "generated_solution")
    assert found.tree.sft.val_batches == 0
    assert any("monitor_gpus" in note for note in found.notes)


@pytest.mark.parametrize("path", ABSENT)
def test_a_feature_that_is_absent_may_be_off_and_is_refused_when_on(grpo, grpo_refused, path):
    if path not in FALSE_IS_A_CHOICE:
        assert grpo(f"{path}=false").notes == ()
    assert grpo(f"{path}=null").notes == ()
    report = grpo_refused(f"{path}={{enabled: true}}")
    assert "absent on purpose" in report and ABSENT[path] in report and f"  {path}" in report


@pytest.mark.parametrize("path", FALSE_IS_A_CHOICE)
def test_a_false_that_changes_what_happens_is_refused_like_a_feature(grpo_refused, path):
    assert ABSENT[path] in grpo_refused(f"{path}=false")


@pytest.mark.parametrize("path", IGNORED)
def test_a_key_that_tunes_what_is_absent_is_dropped_with_a_note(grpo, path):
    (note,) = grpo(f"{path}=7").notes
    assert path in note and IGNORED[path] in note


def test_the_tables_speak_of_no_key_that_exists_and_lead_only_to_keys_that_do():
    known = known_paths(SFTTree) | known_paths(GRPOTree)
    assert not set(known) & (set(ABSENT) | set(IGNORED) | set(MOVED))
    assert set(MOVED.values()) <= set(known)


@pytest.mark.parametrize(("moved", "target"), MOVED.items())
def test_a_key_that_moved_is_refused_with_where_it_is(refused, grpo_refused, moved, target):
    is_known = target in known_paths(SFTTree) and not moved.startswith("grpo.")
    report = (refused if is_known else grpo_refused)(f"{moved}=1")
    assert f"did you mean {target}?" in report


@pytest.mark.parametrize(
    ("spelling", "block"),
    [
        ("muon_nesterov", "policy.optimizer"),
        ("muon_use_nesterov", "policy.optimizer"),
        ("muon_nesterov", "policy.megatron_cfg.optimizer"),
    ],
)
def test_both_spellings_of_nesterov_are_one_key(sft, spelling, block):
    megatron = ("policy.megatron_cfg.enabled=true", "policy.dtensor_cfg.enabled=false")
    tree = sft(*(megatron if "megatron" in block else ()), f"{block}.{spelling}=true").tree
    assert tree.policy.active_optimizer.muon_use_nesterov


def test_of_two_spellings_the_later_one_wins(sft):
    assert not sft(
        "policy.optimizer.muon_nesterov=true", "policy.optimizer.muon_use_nesterov=false"
    ).tree.policy.optimizer.muon_use_nesterov
    assert sft(
        "policy.optimizer.muon_use_nesterov=false", "policy.optimizer.muon_nesterov=true"
    ).tree.policy.optimizer.muon_use_nesterov


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("{name: torch.optim.AdamW, kwargs: {lr: 2}}", {"optimizer": "adam", "lr": 2}),
        (
            "{name: torch.optim.SGD, kwargs: {momentum: 0.5}}",
            {"optimizer": "sgd", "sgd_momentum": 0.5},
        ),
        (
            "{name: torch.optim.Muon, kwargs: {nesterov: true, adjust_lr_fn: match_rms_adamw}}",
            {"optimizer": "muon", "muon_use_nesterov": True, "muon_scale_mode": "match_rms_adamw"},
        ),
        ("null", {"optimizer": "adam", "lr": 5e-6}),
    ],
)
def test_torch_optimizers_by_class_name_become_flat_fields(sft, write, optimizer, expected):
    config = write(f"policy: {{optimizer: {optimizer}}}\n")
    found = sft("--config", config).tree.policy.optimizer
    assert {name: getattr(found, name) for name in expected} == expected


def test_flat_and_nested_spellings_of_one_field_follow_the_order_of_layers(sft, write):
    kwargs = "policy: {optimizer: {name: torch.optim.AdamW, kwargs: {lr: 1e-3}}}\n"
    config = ("--config", write(INHERIT + kwargs))
    assert sft(*config).tree.policy.optimizer.lr == 1e-3
    assert sft(*config, "policy.optimizer.lr=1e-4").tree.policy.optimizer.lr == 1e-4
    assert sft(*config, "policy.optimizer.kwargs.lr=1e-5").tree.policy.optimizer.lr == 1e-5


@pytest.mark.parametrize(
    "optimizer",
    [
        "{name: torch.optim.Adam}",
        "{name: torch.optim.AdamW, kwargs: {amsgrad: true}}",
        "{name: torch.optim.AdamW, kwargs: 3}",
        "{kwargs: {a.b: 1}}",
    ],
)
def test_torch_optimizers_without_an_equal_are_refused(refused, write, optimizer):
    report = refused("--config", write(f"{INHERIT}policy: {{optimizer: {optimizer}}}\n"))
    assert "policy.optimizer." in report


WARM_UP = "{name: torch.optim.lr_scheduler.LinearLR, kwargs: {start_factor: 0.1, total_iters: 20}}"
COSINE = "{name: CosineAnnealingLR, kwargs: {T_max: 30, eta_min: 1e-6}}"


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (f"[{WARM_UP}]", {"lr_warmup_iters": 20, "lr_warmup_init": pytest.approx(5e-7)}),
        (
            f"[{WARM_UP}, {{name: ConstantLR, kwargs: {{factor: 1.0}}}}, {{milestones: [20]}}]",
            {"lr_warmup_iters": 20, "lr_decay_style": "constant"},
        ),
        (
            f"[{WARM_UP}, {COSINE}, {{milestones: [20]}}]",
            {"lr_decay_style": "cosine", "lr_decay_iters": 50},
        ),
        (
            "{name: LinearLR, kwargs: {start_factor: 1, end_factor: 0, total_iters: 9}}",
            {"lr_decay_style": "linear", "lr_decay_iters": 9},
        ),
        ("null", {"lr_decay_style": "constant"}),
    ],
)
def test_torch_schedulers_become_flat_fields(sft, write, stages, expected):
    config = write(f"{INHERIT}policy: {{scheduler: {stages}}}\n")
    found = sft("--config", config).tree.policy.scheduler
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    "stages",
    [
        f"[{WARM_UP}, {COSINE}, {{milestones: [7]}}]",
        f"[{COSINE}, {COSINE}]",
        "[{name: StepLR, kwargs: {step_size: 3}}]",
        "[3]",
    ],
)
def test_torch_schedulers_without_an_equal_are_refused(refused, write, stages):
    report = refused("--config", write(f"{INHERIT}policy: {{scheduler: {stages}}}\n"))
    assert re.search(r"policy.scheduler = .* +\[.*written.yaml", report)


def test_override_in_a_section_replaces_what_was_inherited(sft, write):
    section = "policy: {optimizer: {_override_: true, lr: 1e-3}}\n"
    replaced = sft("--config", write(INHERIT + section)).tree.policy.optimizer
    assert replaced.lr == 1e-3
    assert replaced.weight_decay == SFTTree().policy.optimizer.weight_decay
    merged = write(INHERIT + section.replace("true", "false"))
    assert sft("--config", merged).tree.policy.optimizer.weight_decay == 0.1


def test_zero_means_no_clipping(sft):
    assert sft("policy.max_grad_norm=0").tree.policy.max_grad_norm is None


def test_response_dataset_means_the_local_file(sft, write, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    tree = sft(
        "data.train.dataset_name=ResponseDataset", f"data.train.data_path={tmp_path}/a.jsonl"
    ).tree
    assert tree.data.train.dataset_name is None


def test_of_a_warm_up_in_steps_and_one_as_a_share_the_later_one_counts(sft, write):
    steps = sft("policy.scheduler.lr_warmup_iters=3").tree.policy.scheduler
    assert (steps.lr_warmup_iters, steps.lr_warmup_fraction) == (3, None)
    share = sft("policy.scheduler.lr_warmup_iters=3", "policy.scheduler.lr_warmup_fraction=0.1")
    assert (share.tree.policy.scheduler.lr_warmup_iters) == 0
    assert share.tree.policy.scheduler.lr_warmup_fraction == 0.1


def test_a_muon_setting_that_is_typed_without_muon_is_told_of_and_one_in_a_file_is_not(sft, write):
    typed = "policy.optimizer.muon_momentum=0.9"
    (note,) = sft(typed).notes
    assert note.startswith("policy.optimizer.muon_momentum has no effect under optimizer=adam")
    assert sft(typed, "policy.optimizer.optimizer=muon").notes == ()
    file = write("policy: {optimizer: {muon_momentum: 0.9}}\n")
    assert not any("muon" in note for note in sft("--config", file).notes)


def test_what_is_typed_of_the_idle_backend_is_noted_and_what_a_file_has_of_it_is_not(sft, write):
    config = write(
        "defaults: [sft_tiny, _self_]\npolicy: {megatron_cfg: {sequence_parallel: true}}"
    )
    typed = "policy.megatron_cfg.tensor_model_parallel_size=2"
    (note,) = sft("--config", config, typed).notes
    assert note.startswith("policy.megatron_cfg.tensor_model_parallel_size has no effect")
    assert "policy.megatron_cfg.enabled=true policy.dtensor_cfg.enabled=false" in note
    megatron = ("policy.megatron_cfg.enabled=true", "policy.dtensor_cfg.enabled=false")
    assert sft(*megatron, typed, "cluster.cpu_workers_per_node=2").notes == ()


def test_a_reward_that_judges_nothing_is_noted(grpo):
    reward = "env.custom.reward=my_rewards:brevity"
    (note,) = grpo(reward).notes
    assert "judges nothing" in note and "data.default.env_name=custom" in note
    assert grpo(reward, "data.default.env_name=custom").notes == ()
