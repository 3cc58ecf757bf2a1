"""Keys and values of NeMo-RL that are absent here on purpose, each with its reason."""

from __future__ import annotations

from typing import Any

_MEGATRON, _DTENSOR = "policy.megatron_cfg", "policy.dtensor_cfg"
_GENERATION, _VLLM = "policy.generation", "policy.generation.vllm_cfg"
_LORA = "LoRA is not built: all weights are trained"
_MTP = "multi-token prediction is not built"
_FP8 = "FP8 is not built"
_OFFLOAD_ACTIVATIONS = "activations are recomputed, not moved: use activation_checkpointing"
_STATE = "optimizer state stays where it is"
_DISPATCHER = "tokens travel by moe_token_dispatcher_type"
_NO_TE = "kernels of Transformer Engine are not used"
_ROUTER_BIAS = "no supported model has a router with a bias"
_TEXT_MODELS = "models of text have nothing else to freeze"
_IN_PROCESS = "rollouts are drawn in the run, not over HTTP"
_GYM = "NeMo-Gym is not one of the environments: use env.custom"
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
    "policy.dequantize_base_checkpoint": "weights are read in the type they are stored in",
    "policy.router_replay": "experts are chosen by the weights in training, not as in the rollout",
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
    f"{_MEGATRON}.cuda_graph_scope": "CUDA graphs are not built",
    f"{_MEGATRON}.use_linear_ce_fusion_loss": "the loss is computed in chunks instead",
    f"{_MEGATRON}.attention_backend": "there is one attention, of torch",
    f"{_MEGATRON}.dynamic_context_parallel": "use context_parallel_size, one size for all rows",
    f"{_MEGATRON}.freeze_config": _TEXT_MODELS,
    f"{_MEGATRON}.moe_grouped_gemm": "experts are computed one after the other",
    f"{_MEGATRON}.moe_router_enable_expert_bias": _ROUTER_BIAS,
    f"{_MEGATRON}.moe_flex_dispatcher_backend": _DISPATCHER,
    f"{_MEGATRON}.moe_hybridep_num_sms": _DISPATCHER,
    f"{_MEGATRON}.moe_hybridep_prepad_packed_inputs": _DISPATCHER,
    f"{_MEGATRON}.moe_mlp_glu_interleave_size": _NO_TE,
    f"{_MEGATRON}.use_transformer_engine_op_fuser": _NO_TE,
    f"{_MEGATRON}.fine_grained_activation_offloading": _OFFLOAD_ACTIVATIONS,
    f"{_MEGATRON}.offload_modules": _OFFLOAD_ACTIVATIONS,
    f"{_MEGATRON}.moe_per_layer_logging": "the load of single experts is not logged",
    f"{_MEGATRON}.moe_enable_deepep": _DISPATCHER,
    f"{_MEGATRON}.mtp_num_layers": _MTP,
    f"{_MEGATRON}.mtp_loss_scaling_factor": _MTP,
    f"{_MEGATRON}.mtp_use_repeated_layer": _MTP,
    f"{_MEGATRON}.mtp_detach_heads": _MTP,
    f"{_MEGATRON}.use_fused_weighted_squared_relu": "no supported model has this activation",
    f"{_MEGATRON}.distributed_data_parallel_config.use_custom_fsdp": "FSDP is policy.dtensor_cfg",
    f"{_MEGATRON}.optimizer.optimizer_offload_fraction": _STATE,
    f"{_MEGATRON}.optimizer.overlap_cpu_optimizer_d2h_h2d": _STATE,
    "data.filter_overlong_prompts": "use data.bad_rows=drop",
    "data.default.dataset_name": "name it in data.train and in data.validation",
    **{
        f"data.{name}.{key}": reason
        for name in ("train", "validation")
        for key, reason in (
            ("max_samples", "use num_rows, which takes the first rows"),
            ("repeat", "use grpo.val_num_generations_per_prompt, which asks each prompt often"),
        )
    },
    "data.use_multiple_dataloader": "several sources are mixed by their weight",
    "logger.swanlab_enabled": "sinks are the console, JSONL, TensorBoard, W&B and MLflow",
    "cluster.segment_size": "ranks are placed node by node",
    "grpo.val_start_at": "validation starts with val_at_start or after the first val_period",
    "grpo.stop_at_validation_metric": "a run ends at max_num_steps, or by a signal",
    "grpo.stop_at_validation_threshold": "a run ends at max_num_steps, or by a signal",
    "grpo.seq_logprob_error_threshold": "use "
    "loss_fn.truncated_importance_sampling_type=seq-mask-tis",
    "grpo.invalid_tool_call_advantage": _PENALTIES,
    "grpo.invalid_tool_call_strategy": _PENALTIES,
    "grpo.penalize_invalid_tool_call": _PENALTIES,
    "grpo.penalize_malformed_thinking": _PENALTIES,
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
    f"{_VLLM}.is_mx": _FP8,
    f"{_VLLM}.refit_prequantize": _FP8,
    f"{_VLLM}.quantization_ignored_layer_kws": _FP8,
    f"{_VLLM}.enable_expert_parallel": "experts are shared by tensor_parallel_size",
    f"{_VLLM}.enable_prefix_caching": "prefixes are cached until weights change",
    f"{_VLLM}.env_vars": "set them in the shell: engines inherit them",
    f"{_VLLM}.frozen_engram_checkpoint": "all weights of an engine come from the policy",
    f"{_VLLM}.expose_http_server": _IN_PROCESS,
    f"{_VLLM}.http_server_serving_chat_kwargs": _IN_PROCESS,
    f"{_VLLM}.enable_thinking": "use policy.tokenizer.chat_template_kwargs",
    f"{_VLLM}.num_first_layers_in_bf16": _FP8,
    f"{_VLLM}.num_last_layers_in_bf16": _FP8,
    "env.nemo_gym": _GYM,
    "env.should_use_nemo_gym": _GYM,
    "env.should_log_nemo_gym_responses": _GYM,
    "env.math.verifier_type": "choose by math_verify_impl",
}
"""Features that are absent, with the reason; saying "off" is allowed."""

AS_IT_IS: dict[str, Any] = {
    "grpo.val_start_at": -1,
    "data.default.dataset_name": "ResponseDataset",
    "data.train.repeat": 1,
    "data.validation.repeat": 1,
    f"{_MEGATRON}.attention_backend": "auto",
    f"{_DTENSOR}.expert_parallel_size": 1,
    f"{_VLLM}.pipeline_parallel_size": 1,
    f"{_VLLM}.expert_parallel_size": 1,
    f"{_VLLM}.kv_cache_dtype": "auto",
    f"{_VLLM}.logprobs_mode": "processed_logprobs",
    f"{_VLLM}.enable_prefix_caching": True,
    "env.math.verifier_type": "math",
}
"""Values of `ABSENT` keys that ask for what happens anyway, besides those that say "off"."""

FALSE_IS_A_CHOICE = (f"{_VLLM}.enable_thinking", f"{_VLLM}.enable_prefix_caching")
"""Keys of `ABSENT` whose `false` changes what happens: of these only null says nothing."""

IGNORED: dict[str, str] = {
    "checkpointing.save_consolidated": "model_save_format always writes whole weights",
    "checkpointing.resume_if_exists": "a run goes on from the latest checkpoint of its folder",
    "policy.refit_buffer_size_gb": "weights travel in buckets of a size of their own",
    "policy.generation_batch_size": "it has no effect in NeMo-RL either",
    "policy.sequence_packing.sequence_length_round": "packed rows are padded as the layout needs",
    "policy.sequence_packing.microbatch_order": "ranks get equal numbers of micro-batches",
    f"{_DTENSOR}._v2": "there is one implementation",
    f"{_DTENSOR}.defer_fsdp_grad_sync": "gradients are reduced in every micro-batch",
    f"{_MEGATRON}.fused_linear_logprobs_chunk_size": "use policy.logprob_chunk_size",
    f"{_MEGATRON}.linear_ce_fusion_chunk_size": "use policy.logprob_chunk_size",
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
    f"{_GENERATION}.sglang_cfg": "the engines are vLLM's, or the small one here",
    f"{_VLLM}.load_format": "the first weights come from the policy, like all later ones",
    f"{_VLLM}.skip_tokenizer_init": "an engine has of the tokenizer what it needs",
    f"{_VLLM}.refit_with_reload_api": "engines take weights in one way",
    f"{_VLLM}.sleep_level": "engines that share GPUs keep nothing there while they sleep",
    "env.dapo": "answers are judged by env.math, with math_verify_impl=dapo_math_verify",
    "logger.num_train_samples_to_print": "the answers of validations are in samples.jsonl",
    f"{_VLLM}.use_tqdm": "the run has a progress bar of its own",
    f"{_VLLM}.enable_vllm_metrics_logger": "what engines do is among the metrics",
    f"{_VLLM}.vllm_metrics_logger_interval": "what engines do is among the metrics",
    "cluster.master_port_range_low": "free ports are found by themselves",
    "cluster.master_port_range_high": "free ports are found by themselves",
}
"""Keys that tune what does not exist here: dropped, with a note."""

WITHOUT_VALUE: dict[tuple[str, Any], str] = {
    ("policy.precision", "float16"): "float16 needs loss scaling, which is not here; use bfloat16",
    (f"{_VLLM}.precision", "fp8"): "engines compute in the precision of the policy",
    (f"{_MEGATRON}.moe_token_dispatcher_type", "flex"): "DeepEP and HybridEP are not built; "
    "use alltoall",
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
