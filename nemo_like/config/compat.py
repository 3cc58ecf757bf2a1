"""What NeMo-RL configs say differently: keys that are absent here on purpose, and other spellings.

Nothing else in the package knows these. A key that is absent but says "off" (as NeMo-RL's own files
do for most features) asks for what happens anyway, and is dropped; any other value is refused with
the reason. `IGNORED` keys tune something that does not exist here: they are dropped and noted.
"""

from __future__ import annotations

from typing import Any

from nemo_like.config.draft import Draft
from nemo_like.config.optimizer import NO_WARM_UP
from nemo_like.config.torch_optimizers import translate_optimizer, translate_scheduler

_MEGATRON, _DTENSOR = "policy.megatron_cfg", "policy.dtensor_cfg"
_GENERATION, _VLLM = "policy.generation", "policy.generation.vllm_cfg"
_LORA = "LoRA is not built: all weights are trained"
_MTP = "multi-token prediction is not built"
_FP8 = "FP8 training is not built"
_OFFLOAD_ACTIVATIONS = "activations are recomputed, not moved: use activation_checkpointing"
_STATE = "optimizer state stays where it is"
_TEXT_ONLY = "rollouts are text"
_PENALTIES = "write what you want to reward as a function: env.custom.reward"
_RETENTION = "use checkpointing.save_period and keep_top_k; the latest is always kept"

ABSENT: dict[str, str] = {
    "checkpointing.pretrained_checkpoint": "start from HF weights: policy.model_name=<path>",
    "checkpointing.ft_keep_latest_k": _RETENTION,
    "checkpointing.ft_save_period": _RETENTION,
    "checkpointing.model_cache_dir": "the cache of models is Hugging Face's: set HF_HOME",
    "checkpointing.model_repo_id": "checkpoints are local; upload the hf/ folder of one",
    "checkpointing.is_peft": _LORA,
    "policy.offload_optimizer_for_logprob": _STATE,
    "policy.draft": "draft models are not trained",
    "policy.tokenizer.use_fastokens": "the tokenizer is transformers' fast one",
    "policy.sequence_packing.fuse_loss": "the loss is computed in chunks instead",
    f"{_DTENSOR}.lora_cfg": _LORA,
    f"{_DTENSOR}.custom_parallel_plan": "the plan follows from the model family",
    f"{_DTENSOR}.automodel_kwargs": "models are transformers' own, without replaced kernels",
    f"{_DTENSOR}.expert_parallel_size": "mixture-of-experts models run on the Megatron backend",
    f"{_DTENSOR}.moe_parallelizer": "mixture-of-experts models run on the Megatron backend",
    f"{_DTENSOR}.clear_cache_every_n_steps": "allocator tuning: use env_vars",
    f"{_MEGATRON}.peft": _LORA,
    f"{_MEGATRON}.fp8_cfg": _FP8,
    f"{_MEGATRON}.checkpoint.async_save": "use checkpointing.is_async",
    f"{_MEGATRON}.use_fused_linear_logprobs": "log-probabilities are computed in chunks instead",
    f"{_MEGATRON}.cuda_graph_impl": "CUDA graphs are not built",
    f"{_MEGATRON}.cuda_graph_modules": "CUDA graphs are not built",
    f"{_MEGATRON}.fine_grained_activation_offloading": _OFFLOAD_ACTIVATIONS,
    f"{_MEGATRON}.offload_modules": _OFFLOAD_ACTIVATIONS,
    f"{_MEGATRON}.moe_per_layer_logging": "the load of single experts is not logged",
    f"{_MEGATRON}.moe_enable_deepep": "tokens travel by moe_token_dispatcher_type",
    f"{_MEGATRON}.mtp_num_layers": _MTP,
    f"{_MEGATRON}.mtp_loss_scaling_factor": _MTP,
    f"{_MEGATRON}.mtp_use_repeated_layer": _MTP,
    f"{_MEGATRON}.mtp_detach_heads": _MTP,
    f"{_MEGATRON}.use_fused_weighted_squared_relu": "no supported model has this activation",
    f"{_MEGATRON}.distributed_data_parallel_config.use_custom_fsdp": "FSDP is policy.dtensor_cfg",
    f"{_MEGATRON}.optimizer.optimizer_offload_fraction": _STATE,
    f"{_MEGATRON}.optimizer.overlap_cpu_optimizer_d2h_h2d": _STATE,
    "data.use_multiple_dataloader": "several sources are mixed by their weight",
    "logger.swanlab_enabled": "sinks are the console, JSONL, TensorBoard, W&B and MLflow",
    "cluster.segment_size": "ranks are placed node by node",
    "grpo.val_start_at": "validation starts with val_at_start or after the first val_period",
    "grpo.stop_at_validation_metric": "a run ends at max_num_steps, or by a signal",
    "grpo.stop_at_validation_threshold": "a run ends at max_num_steps, or by a signal",
    "grpo.seq_logprob_error_threshold": "use "
    "loss_fn.truncated_importance_sampling_type=seq-mask-tis",
    "grpo.invalid_tool_call_advantage": _PENALTIES,
    "grpo.malformed_thinking_advantage": _PENALTIES,
    "grpo.deduplicate_multimodal_data": _TEXT_ONLY,
    "grpo.async_grpo.max_generation_failures": "an engine that fails is replaced",
    "grpo.async_grpo.in_flight_weight_updates": "a rollout is drawn by one version of the weights",
    "loss_fn.positive_example_nll_weight": "the loss is a policy gradient alone",
    "reward_penalties": _PENALTIES,
    "data_plane": "batches travel through Ray's object store",
    "on_policy_distillation": "distillation is not built",
    f"{_GENERATION}.vllm_kwargs": "engines are made from vllm_cfg alone, so that what they promise "
    "holds",
    f"{_VLLM}.pipeline_parallel_size": "an engine is one machine's: use tensor_parallel_size",
    f"{_VLLM}.expert_parallel_size": "experts are shared by tensor_parallel_size",
    f"{_VLLM}.kv_cache_dtype": "the cache has the type of the weights",
    f"{_VLLM}.logprobs_mode": "log-probabilities are those of the distribution drawn from",
    f"{_VLLM}.use_deep_gemm": _FP8,
    f"{_VLLM}.num_first_layers_in_bf16": _FP8,
    f"{_VLLM}.num_last_layers_in_bf16": _FP8,
    "env.math.verifier_type": "choose by math_verify_impl",
}
"""Features that are absent, with the reason; saying "off" is allowed."""

AS_IT_IS: dict[str, Any] = {
    "grpo.val_start_at": -1,
    f"{_DTENSOR}.expert_parallel_size": 1,
    f"{_VLLM}.pipeline_parallel_size": 1,
    f"{_VLLM}.expert_parallel_size": 1,
    f"{_VLLM}.kv_cache_dtype": "auto",
    f"{_VLLM}.logprobs_mode": "processed_logprobs",
    "env.math.verifier_type": "math",
}
"""Values of `ABSENT` keys that ask for what happens anyway, besides those that say "off"."""

IGNORED: dict[str, str] = {
    "checkpointing.save_consolidated": "model_save_format always writes whole weights",
    "policy.generation_batch_size": "it has no effect in NeMo-RL either",
    "policy.sequence_packing.sequence_length_round": "packed rows are padded as the layout needs",
    "policy.sequence_packing.microbatch_order": "ranks get equal numbers of micro-batches",
    f"{_DTENSOR}._v2": "there is one implementation",
    f"{_DTENSOR}.defer_fsdp_grad_sync": "gradients are reduced in every micro-batch",
    f"{_MEGATRON}.fused_linear_logprobs_chunk_size": "use policy.logprob_chunk_size",
    f"{_MEGATRON}.cuda_graph_warmup_steps": "CUDA graphs are not built",
    f"{_MEGATRON}.force_reconvert_from_hf": "weights are read afresh, not from a converted copy",
    f"{_MEGATRON}.checkpoint": "one checkpoint store serves both backends",
    f"{_MEGATRON}.defer_fp32_logits": "logits become fp32 chunk by chunk",
    f"{_MEGATRON}.use_gloo_process_groups": "process groups follow the device",
    f"{_MEGATRON}.converter_type": "the model's own configuration says its family",
    f"{_MEGATRON}.distributed_data_parallel_config.average_in_collective": "losses are divided by "
    "what the whole batch counts",
    f"{_MEGATRON}.train_iters": "the algorithm counts the steps",
    f"{_MEGATRON}.distributed_data_parallel_config.data_parallel_sharding_strategy": "see "
    "optimizer.use_distributed_optimizer",
    "data.default.processor": "rows are read by input_key, output_key or messages_key",
    "data.train.processor": "rows are read by input_key, output_key or messages_key",
    "data.validation.processor": "rows are read by input_key, output_key or messages_key",
    "logger.monitor_gpus": "peak memory and MFU are logged wherever there is a GPU",
    "logger.gpu_monitoring": "peak memory and MFU are logged wherever there is a GPU",
    "logger.swanlab": "SwanLab is not one of the sinks",
    "grpo.skip_reference_policy_logprobs_calculation": "the reference is asked where the KL "
    "penalty is not 0",
    "grpo.calculate_advantages_on_gpu": "advantages are a few numbers",
    "grpo.debug_payload_metrics": "all metrics are always logged",
    "grpo.async_grpo.recompute_kv_cache_after_weight_updates": "no cache outlives its weights",
    f"{_GENERATION}.val_temperature": "the first answer is greedy, others are drawn as in training",
    f"{_GENERATION}.val_top_p": "the first answer is greedy, others are drawn as in training",
    f"{_GENERATION}.val_top_k": "the first answer is greedy, others are drawn as in training",
    f"{_GENERATION}.port_range_low": "free ports are found by themselves",
    f"{_GENERATION}.port_range_high": "free ports are found by themselves",
    f"{_GENERATION}.refit_cfg": "see refit_transport",
    f"{_GENERATION}.real_quant_export_cpu_offload": "weights are not quantised",
    f"{_GENERATION}.mcore_generation_config": "the engines are vLLM's, or the small one here",
    f"{_VLLM}.async_engine": "one kind of engine serves both ways",
    f"{_VLLM}.use_tqdm": "the run has a progress bar of its own",
    f"{_VLLM}.enable_vllm_metrics_logger": "what engines do is among the metrics",
    f"{_VLLM}.vllm_metrics_logger_interval": "what engines do is among the metrics",
    "cluster.master_port_range_low": "free ports are found by themselves",
    "cluster.master_port_range_high": "free ports are found by themselves",
}
"""Keys that tune what does not exist here: dropped, with a note."""

WITHOUT_VALUE: dict[tuple[str, Any], str] = {
    ("policy.precision", "float16"): "float16 needs loss scaling, which is not here; use bfloat16",
    (f"{_MEGATRON}.optimizer.fp16", True): "float16 needs loss scaling, which is not here",
    (
        f"{_MEGATRON}.optimizer.params_dtype",
        "bfloat16",
    ): "the weights in training are fp32 masters; policy.precision says what is computed in",
    **{
        (f"{_GENERATION}.backend", name): "rollouts are drawn by vllm, or by hf"
        for name in ("megatron", "sglang", "dynamo", "trtllm")
    },
    ("grpo.adv_estimator.name", "gdpo"): "an environment gives one reward, not several",
    ("grpo.adv_estimator.name", "opd"): "distillation is not built",
    ("checkpointing.model_save_format", "torch_save"): "pickled weights can run code when loaded",
    **{
        (
            f"data.{name}.dataset_name",
            "squad",
        ): "its answers are lists beside a context, not a text "
        "in a column: write its rows as messages to a .jsonl file and name that as data_path"
        for name in ("train", "validation")
    },
}
"""Values that NeMo-RL has and that are refused for a reason worth telling."""

RENAMED: dict[str, str] = {
    "policy.optimizer.muon_nesterov": "policy.optimizer.muon_use_nesterov",
    f"{_MEGATRON}.optimizer.muon_nesterov": f"{_MEGATRON}.optimizer.muon_use_nesterov",
    "grpo.adv_estimator.normalize_rewards": "grpo.normalize_rewards",
    "grpo.adv_estimator.use_leave_one_out_baseline": "grpo.use_leave_one_out_baseline",
}
"""Two spellings of one key."""

NULL_IS_DEFAULT = (
    "policy.optimizer",
    "policy.scheduler",
    f"{_DTENSOR}.env_vars",
    f"{_MEGATRON}.env_vars",
    f"{_MEGATRON}.optimizer",
    f"{_MEGATRON}.scheduler",
    "policy.hf_config_overrides",
    "policy.logprob_chunk_size",
    f"{_GENERATION}.stop_strings",
    f"{_GENERATION}.colocated.resources",
)
"""Sections and lists that NeMo-RL files leave null."""

MOVED: dict[str, str] = {
    "sft.lr": "policy.optimizer.lr",
    "sft.learning_rate": "policy.optimizer.lr",
    "policy.lr": "policy.optimizer.lr",
    "policy.learning_rate": "policy.optimizer.lr",
    "policy.optimizer.learning_rate": "policy.optimizer.lr",
    "policy.optimizer.betas": "policy.optimizer.adam_beta1",
    "policy.optimizer.eps": "policy.optimizer.adam_eps",
    "policy.optimizer.warmup_steps": "policy.scheduler.lr_warmup_iters",
    "policy.scheduler.warmup_ratio": "policy.scheduler.lr_warmup_fraction",
    "policy.fsdp_offload_enabled": "policy.dtensor_cfg.cpu_offload",
    "policy.activation_checkpointing_enabled": "policy.dtensor_cfg.activation_checkpointing",
    "policy.tensor_parallel_size": "policy.dtensor_cfg.tensor_parallel_size",
    f"{_MEGATRON}.tensor_parallel_size": f"{_MEGATRON}.tensor_model_parallel_size",
    f"{_DTENSOR}.tensor_model_parallel_size": "policy.dtensor_cfg.tensor_parallel_size",
    "data.dataset_name": "data.train.dataset_name",
    "data.prompt_file": "data.default.prompt_file",
    "data.system_prompt_file": "data.default.system_prompt_file",
    "checkpointing.async_save": "checkpointing.is_async",
    "sft.checkpoint_dir": "checkpointing.checkpoint_dir",
    "grpo.lr": "policy.optimizer.lr",
    "grpo.learning_rate": "policy.optimizer.lr",
    "grpo.num_generations": "grpo.num_generations_per_prompt",
    "grpo.kl_coef": "loss_fn.reference_policy_kl_penalty",
    "grpo.beta": "loss_fn.reference_policy_kl_penalty",
    "grpo.epsilon": "loss_fn.ratio_clip_min",
    "grpo.epsilon_high": "loss_fn.ratio_clip_max",
    "grpo.temperature": "policy.generation.temperature",
    "grpo.checkpoint_dir": "checkpointing.checkpoint_dir",
    "loss_fn.kl_coef": "loss_fn.reference_policy_kl_penalty",
    f"{_GENERATION}.max_tokens": f"{_GENERATION}.max_new_tokens",
    f"{_GENERATION}.tensor_parallel_size": f"{_VLLM}.tensor_parallel_size",
    f"{_GENERATION}.gpu_memory_utilization": f"{_VLLM}.gpu_memory_utilization",
    f"{_VLLM}.max_num_seqs": f"{_GENERATION}.max_num_seqs",
}
"""Where users look for a key, and where it is: for suggestions only."""

_DAPO = {"input_key": "prompt.0.content", "output_key": "reward_model.ground_truth"}
_PROBLEM = {"input_key": "problem", "output_key": "answer"}
_GSM8K = {
    "dataset_name": "openai/gsm8k",
    "subset": "main",
    "input_key": "question",
    "output_key": "answer",
}
_DAPO_17K = {"dataset_name": "BytedTsinghua-SIA/DAPO-Math-17k"} | _DAPO
DATASETS: dict[str, dict[str, str]] = {
    "OpenMathInstruct-2": {
        "dataset_name": "nvidia/OpenMathInstruct-2",
        "split": "train_1M",
        "input_key": "problem",
        "output_key": "expected_answer",
    },
    "DAPOMath17K": _DAPO_17K,
    "DAPO-Math-17k": _DAPO_17K,
    "DAPOMathAIME2024": {"dataset_name": "BytedTsinghua-SIA/AIME-2024"} | _DAPO,
    "AIME2024": {"dataset_name": "HuggingFaceH4/aime_2024"} | _PROBLEM,
    "MATH-500": {"dataset_name": "HuggingFaceH4/MATH-500", "split": "test"} | _PROBLEM,
    "math500": {"dataset_name": "HuggingFaceH4/MATH-500", "split": "test"} | _PROBLEM,
    "DeepScaler": {"dataset_name": "agentica-org/DeepScaleR-Preview-Dataset"} | _PROBLEM,
    "GSM8K": _GSM8K,
    "gsm8k": _GSM8K,
}
"""Short names of data sets (NeMo-RL's, and what people say), and what its loaders read."""


def translate(draft: Draft) -> None:
    """Rewrite a draft in place into the schema's language; what can not be said is a problem."""
    for path, target in RENAMED.items():
        draft.move(path, target)
    for path in NULL_IS_DEFAULT:
        if draft.find(path) == (True, None):
            draft.take(path)
    translate_optimizer(draft)
    translate_scheduler(draft)
    _one_warm_up(draft)
    _tis_is_implied(draft)
    _zero_is_off(draft)
    _translate_sources(draft)
    for path, reason in ABSENT.items():
        _drop(draft, path, reason)
    for path, reason in IGNORED.items():
        if draft.find(path)[0]:
            origin = draft.origin(path)
            if draft.take(path) not in ({}, None):
                draft.notes.append(f"{path} is ignored: {reason} ({origin.text})")
    for (path, value), reason in WITHOUT_VALUE.items():
        found, given = draft.find(path)
        if found and given == value and type(given) is type(value):
            draft.refuse(path, reason)


def _drop(draft: Draft, path: str, reason: str) -> None:
    found, value = draft.find(path)
    if not found:
        return
    if _is_off(value) or value == AS_IT_IS.get(path):
        draft.take(path)
    else:
        draft.refuse(path, f"absent on purpose: {reason}")


def _is_off(value: Any) -> bool:
    if isinstance(value, dict) and "enabled" in value:
        return not value["enabled"]
    if isinstance(value, dict):
        return all(map(_is_off, value.values()))
    return value in (None, False, 0, "none", "None", "", {}, [])


def _one_warm_up(draft: Draft) -> None:
    """Of the two keys for the length of a warm-up, the one that a later layer wrote counts."""
    for block in ("policy.scheduler", f"{_MEGATRON}.scheduler"):
        paths = [f"{block}.{key}" for key in NO_WARM_UP]
        if any(draft.find(path)[1] is None for path in paths):
            continue
        first, last = sorted(paths, key=draft.origin)
        if draft.origin(first).layer < draft.origin(last).layer:
            draft.take(first)


def _tis_is_implied(draft: Draft) -> None:
    """A bound of importance weights alone means `tis`, the first kind that there was."""
    bound, kind = (f"loss_fn.truncated_importance_sampling_{name}" for name in ("ratio", "type"))
    if draft.find(bound)[1] is not None and not draft.find(kind)[0]:
        draft.put(kind, "tis", draft.origin(bound))


def _zero_is_off(draft: Draft) -> None:
    """NeMo-RL says "off" or "all" by numbers below one, where the schema has null or 0."""
    for path, instead in (
        ("policy.max_grad_norm", None),
        ("sft.val_period", 0),
        ("sft.val_batches", 0),
        ("grpo.val_period", 0),
        (f"{_GENERATION}.top_k", None),
    ):
        found, value = draft.find(path)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if found and number and value <= 0 and value != instead:
            _replace(draft, path, instead)


def _translate_sources(draft: Draft) -> None:
    """Short names of data sets become hub names; `ResponseDataset` means "the local file"."""
    for name in ("train", "validation"):
        found, value = draft.find(f"data.{name}")
        if not found:
            continue
        several = isinstance(value, list)
        for source in value if several else [value]:
            if isinstance(source, dict):
                _translate_source(source)


def _translate_source(source: dict[str, Any]) -> None:
    if source.get("dataset_name") == "ResponseDataset" and source.get("data_path"):
        del source["dataset_name"]
        return
    known = DATASETS.get(str(source.get("dataset_name")))
    if known is not None and not source.get("data_path"):
        source |= {k: v for k, v in known.items() if k == "dataset_name" or k not in source}


def _replace(draft: Draft, path: str, value: Any) -> None:
    origin = draft.origin(path)
    draft.take(path)
    draft.put(path, value, origin)
