"""From a Hugging Face configuration and the policy's to megatron-core's: honoured, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_like.backends.megatron.convert import WeightTable, has_experts
from nemo_like.backends.megatron.places import layers_of_stages
from nemo_like.config.policy import PolicyConfig
from nemo_like.errors import ConfigError
from nemo_like.optim.views import attention_shape

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

FROM_HF = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "layernorm_epsilon": "rms_norm_eps",
}
MOE_FROM_HF = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}


def inverse_frequencies(hf_config: Any) -> Tensor:
    """Radians per token of each pair of a head's dimensions. Shapes: [C / 2], fp32.

    Raises:
        ConfigError: a kind of rotary embedding that also scales attention or changes with length.
    """
    parameters = hf_config.rope_parameters
    kind, part = parameters["rope_type"], parameters.get("partial_rotary_factor", 1)
    if kind not in ("default", "linear", "llama3") or part != 1:
        raise ConfigError(
            f"policy.model_name: rotary embedding {parameters} is not supported by the Megatron "
            "backend; supported: rope_type default, linear and llama3, of whole heads"
        )
    if kind == "default":
        width = attention_shape(hf_config).head_dim
        exponents = torch.arange(0, width, 2, dtype=torch.float) / width
        return 1.0 / parameters["rope_theta"] ** exponents
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return frequencies


def transformer_config(policy: PolicyConfig, hf_config: Any) -> TransformerConfig:
    """The whole configuration of a stage's model.

    Raises:
        ConfigError: what the model or the policy asks for is not here, or does not fit the layout.
    """
    from megatron.core.transformer import TransformerConfig

    refuse_unsupported(policy, hf_config)
    fields = _model_fields(hf_config) | _layout_fields(policy)
    if hf_config.model_type == "qwen3_moe":
        fields |= _moe_fields(policy, hf_config)
    try:
        return TransformerConfig(**fields | policy.megatron_cfg.model_overrides)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"policy.megatron_cfg: megatron-core refuses this: {error}") from error


def refuse_unsupported(policy: PolicyConfig, hf_config: Any) -> None:
    """Look at all that the model and the policy ask for; needs no megatron-core.

    Raises:
        ConfigError: something is not here, or does not fit the layout.
    """
    config = policy.megatron_cfg
    # The table refuses biases that it does not know, and matrices that can not be cut.
    WeightTable.of(config, hf_config)
    inverse_frequencies(hf_config)
    layers_of_stages(config, hf_config.num_hidden_layers)
    for key, reason in (*_model_refusals(hf_config), *_policy_refusals(policy, hf_config)):
        raise ConfigError(f"{key}: {reason}")


def _model_refusals(hf_config: Any) -> Iterator[tuple[str, str]]:
    model = hf_config.to_dict()
    for name, only in (
        ("hidden_act", "silu"),
        ("attention_dropout", 0.0),
        ("use_sliding_window", False),
    ):
        if (found := model.get(name, only)) != only:
            yield (
                f"policy.hf_config_overrides.{name}",
                f"the model has {found!r}, and the Megatron backend only {only!r}",
            )


def _policy_refusals(policy: PolicyConfig, hf_config: Any) -> Iterator[tuple[str, str]]:
    config, block = policy.megatron_cfg, "policy.megatron_cfg."
    kinds = {has_experts(hf_config, i) for i in range(hf_config.num_hidden_layers)}
    for module, is_expert in (("moe", True), ("mlp", False)):
        if module in (config.recompute_modules or ()) and is_expert not in kinds:
            yield f"{block}recompute_modules", f"the model has no layer with {module!r}"
    yield from _layout_refusals(policy, hf_config)
    if hf_config.model_type == "qwen3_moe":
        yield from _moe_refusals(policy, hf_config)
    elif config.expert_model_parallel_size > 1:
        yield (
            f"{block}expert_model_parallel_size",
            f"{hf_config.model_type} has no experts; set it to 1",
        )


def _layout_refusals(policy: PolicyConfig, hf_config: Any) -> Iterator[tuple[str, str]]:
    config, block = policy.megatron_cfg, "policy.megatron_cfg."
    tp, groups = config.tensor_model_parallel_size, hf_config.num_key_value_heads
    if hf_config.num_attention_heads % tp:
        yield (
            f"{block}tensor_model_parallel_size",
            f"{tp} does not divide the model's num_attention_heads={hf_config.num_attention_heads}",
        )
    if groups % tp and tp % groups:
        yield (
            f"{block}tensor_model_parallel_size",
            f"{tp} and the model's num_key_value_heads={groups}: one must divide the other",
        )
    optimizer = policy.active_optimizer
    blockwise = optimizer.is_muon and optimizer.muon_tp_mode == "blockwise"
    if blockwise and groups % tp and (optimizer.muon_split_qkv or optimizer.muon_split_heads):
        yield (
            f"{block}tensor_model_parallel_size",
            f"under muon_tp_mode=blockwise each of the {tp} ranks cuts its own block of q, k and v "
            f"apart, and {groups} heads of keys can not be shared out whole; set policy.optimizer."
            "muon_split_qkv=false and policy.optimizer.muon_split_heads=false, or another "
            "muon_tp_mode",
        )


def _moe_refusals(policy: PolicyConfig, hf_config: Any) -> Iterator[tuple[str, str]]:
    config, block = policy.megatron_cfg, "policy.megatron_cfg."
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        yield (
            f"{block}sequence_parallel",
            "experts under tensor parallelism need sequence_parallel=true",
        )
    if hf_config.num_experts % config.expert_model_parallel_size:
        yield (
            f"{block}expert_model_parallel_size",
            f"{config.expert_model_parallel_size} does not divide num_experts="
            f"{hf_config.num_experts}",
        )
    if config.moe_router_load_balancing_type == "sinkhorn":
        yield (
            f"{block}moe_router_load_balancing_type",
            "sinkhorn routes otherwise in training than without gradient, so log-probabilities "
            "would not agree; use aux_loss, seq_aux_loss or none",
        )
    replica = config.tensor_model_parallel_size * config.context_parallel_size
    sharing = config.expert_model_parallel_size * config.expert_tensor_parallel_size
    if config.moe_token_dispatcher_type == "allgather" and (
        config.pipeline_model_parallel_size > 1 or replica % sharing
    ):
        yield (
            f"{block}moe_token_dispatcher_type",
            "allgather needs as many tokens on all ranks that share experts, and replicas and "
            "stages have rows of various lengths; use alltoall",
        )


def _model_fields(hf_config: Any) -> dict[str, Any]:
    fields = {ours: getattr(hf_config, theirs) for ours, theirs in FROM_HF.items()}
    return fields | {
        "kv_channels": attention_shape(hf_config).head_dim,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": hf_config.model_type == "qwen2",
        "qk_layernorm": hf_config.model_type.startswith("qwen3"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _layout_fields(policy: PolicyConfig) -> dict[str, Any]:
    config, dtype = policy.megatron_cfg, getattr(torch, policy.precision)
    pp = config.pipeline_model_parallel_size
    fields = {
        name: getattr(config, name)
        for name in (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
            *("context_parallel_size", "expert_model_parallel_size"),
            *("expert_tensor_parallel_size", "sequence_parallel", "bias_activation_fusion"),
            *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
        )
    }
    fields |= {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "perform_initialization": False,  # weights are loaded, also a newborn model's
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        # Gradients are summed over ranks: losses are divided by global counts already.
        "calculate_per_token_loss": True,
        "variable_seq_lengths": pp > 1,
        "deallocate_pipeline_outputs": pp > 1,
        # What megatron-core requires of any model whose rows vary in length; others ignore it.
        "moe_token_dispatcher_type": "alltoall",
    }
    if config.activation_checkpointing and config.recompute_granularity == "full":
        fields |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif config.activation_checkpointing:
        modules = config.recompute_modules
        fields |= {
            "recompute_granularity": "selective",
            "recompute_modules": None if modules is None else list(modules),
        }
    return fields


def _moe_fields(policy: PolicyConfig, hf_config: Any) -> dict[str, Any]:
    config = policy.megatron_cfg
    balancing = config.moe_router_load_balancing_type
    return {ours: getattr(hf_config, theirs) for ours, theirs in MOE_FROM_HF.items()} | {
        # Softmax over the chosen experts is softmax over all, brought to a sum of one.
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        "moe_router_dtype": config.moe_router_dtype,
        "moe_router_load_balancing_type": balancing,
        "moe_aux_loss_coeff": 0.0 if balancing == "none" else hf_config.router_aux_loss_coef,
        "moe_token_dispatcher_type": config.moe_token_dispatcher_type,
        "moe_grouped_gemm": False,
    }
