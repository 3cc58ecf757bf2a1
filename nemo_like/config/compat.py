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
_LORA = "LoRA is not built: all weights are trained"
_MTP = "multi-token prediction is not built"
_FP8 = "FP8 training is not built"
_OFFLOAD_ACTIVATIONS = "activations are recomputed, not moved: use activation_checkpointing"
_RETENTION = "use checkpointing.save_period and keep_top_k; the latest is always kept"

ABSENT: dict[str, str] = {
    "checkpointing.pretrained_checkpoint": "start from HF weights: policy.model_name=<path>",
    "checkpointing.ft_keep_latest_k": _RETENTION,
    "checkpointing.ft_save_period": _RETENTION,
    "checkpointing.model_cache_dir": "the cache of models is Hugging Face's: set HF_HOME",
    "checkpointing.model_repo_id": "checkpoints are local; upload the hf/ folder of one",
    "checkpointing.is_peft": _LORA,
    "policy.offload_optimizer_for_logprob": "optimizer state stays where it is",
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
    f"{_MEGATRON}.optimizer.optimizer_offload_fraction": "use optimizer_cpu_offload, whole or not",
    f"{_MEGATRON}.optimizer.overlap_cpu_optimizer_d2h_h2d": "use optimizer_cpu_offload",
    "data.use_multiple_dataloader": "several sources are mixed by their weight",
    "logger.swanlab_enabled": "sinks are the console, JSONL, TensorBoard, W&B and MLflow",
    "cluster.segment_size": "ranks are placed node by node",
}
"""Features that are absent, with the reason; saying "off" is allowed."""

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
    f"{_MEGATRON}.train_iters": "the algorithm counts the steps",
    f"{_MEGATRON}.distributed_data_parallel_config.data_parallel_sharding_strategy": "see "
    "optimizer.use_distributed_optimizer",
    "data.default.processor": "rows are read by input_key, output_key or messages_key",
    "data.train.processor": "rows are read by input_key, output_key or messages_key",
    "data.validation.processor": "rows are read by input_key, output_key or messages_key",
    "logger.monitor_gpus": "peak memory and MFU are logged wherever there is a GPU",
    "logger.gpu_monitoring": "peak memory and MFU are logged wherever there is a GPU",
    "logger.swanlab": "SwanLab is not one of the sinks",
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
)
"""Sections that NeMo-RL files leave null."""

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
}
"""Where users look for a key, and where it is: for suggestions only."""

DATASETS: dict[str, dict[str, str]] = {
    "OpenMathInstruct-2": {
        "dataset_name": "nvidia/OpenMathInstruct-2",
        "input_key": "problem",
        "output_key": "expected_answer",
    },
}
"""NeMo-RL's short names of data sets, and the columns its loaders read."""


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
    if _is_off(value) or (path.endswith("parallel_size") and value == 1):
        draft.take(path)
    else:
        draft.refuse(path, f"absent on purpose: {reason}")


def _is_off(value: Any) -> bool:
    if isinstance(value, dict) and value:
        return not value.get("enabled", False)
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


def _zero_is_off(draft: Draft) -> None:
    """NeMo-RL says "off" or "all" by numbers below one, where the schema has null or 0."""
    for path, instead in (
        ("policy.max_grad_norm", None),
        ("sft.val_period", 0),
        ("sft.val_batches", 0),
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
