"""A pipeline stage of a causal LM that yields log-probabilities, in megatron-core's buckets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from nemo_like.backends.megatron.architecture import inverse_frequencies, transformer_config
from nemo_like.backends.megatron.convert import has_experts, padded_vocab_size
from nemo_like.backends.megatron.layers import RotaryPositions, decoder_spec
from nemo_like.backends.megatron.parallel import Parallel
from nemo_like.backends.megatron.rows import LocalRows
from nemo_like.config.policy import PolicyConfig
from nemo_like.ops.logprobs import linear_logprobs

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=local_experts\.)\d+")


class Stage(GPTModel):
    """megatron-core's model with our attention, positions and end.

    Called with `LocalRows`. The last stage gives log p(target | its past) in fp32 nats of all of
    the micro-batch's targets, the same on its tensor- and context-parallel ranks; other stages
    give hidden states.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Any,
        parallel: Parallel,
        *,
        chunk_size: int,
        temperature: float,
    ) -> None:
        stage = parallel.rank("pp")
        self.first_layer = get_transformer_layer_offset(config, pp_rank=stage)
        end = self.first_layer + get_num_layers_to_build(config, pp_rank=stage)
        super().__init__(
            config,
            decoder_spec(config, [has_experts(hf_config, i) for i in range(self.first_layer, end)]),
            vocab_size=padded_vocab_size(hf_config.vocab_size, tp_size=parallel.size("tp")),
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=parallel.is_first_stage,
            post_process=parallel.is_last_stage,
            position_embedding_type="none",
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        )
        self.rotary = RotaryPositions(inverse_frequencies(hf_config)).to(parallel.device)
        self.vocab_size_unpadded = hf_config.vocab_size
        self.balancing_coefficient = config.moe_aux_loss_coeff
        self.chunk_size = chunk_size
        self.temperature = temperature
        self.parallel = parallel

    def forward(self, rows: LocalRows) -> Tensor:
        """Hidden states, or of the last stage log-probabilities. Shapes: [T, R, D] or [M]."""
        return super().forward(rows.input_ids_Rt, None, None, packed_seq_params=rows)

    def _preprocess(self, *, packed_seq_params: LocalRows, **inputs: Any) -> tuple[Any, ...]:
        rows = packed_seq_params
        before, _, *rest, _ = super()._preprocess(packed_seq_params=rows, **inputs)
        padding = None
        if self.config.num_moe_experts:  # only they ask
            padding = rows.padding_Rt
            if self.config.sequence_parallel:
                size, rank = self.parallel.size("tp"), self.parallel.rank("tp")
                padding = padding.chunk(size, 1)[rank]
        return before, self.rotary(rows.positions_tR), *rest, padding

    def _postprocess(
        self, *, hidden_states: Tensor, packed_seq_params: LocalRows, **_: Any
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        rows, parallel = packed_seq_params, self.parallel
        # Each rank's slice of the vocabulary gives a part of the hidden states' gradient.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        if self.temperature != 1:
            hidden = hidden / self.temperature  # as good as logits divided, and smaller
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        start = parallel.rank("tp") * len(weight)
        logprobs_m = linear_logprobs(
            hidden.flatten(0, 1)[rows.predictor_m],
            # Rows that fill the vocabulary up are no tokens.
            weight[: max(0, self.vocab_size_unpadded - start)],
            rows.target_m,
            chunk_size=self.chunk_size,
            group=self.tp_group if parallel.size("tp") > 1 else None,
            vocab_start=start,
        )
        if parallel.size("cp") == 1:
            return logprobs_m
        whole_M = logprobs_m.new_zeros(rows.num_targets).index_put((rows.place_m,), logprobs_m)
        return reduce_from_tensor_model_parallel_region(whole_M, group=self.cp_group)

    def weigh_balancing_loss(self, num_micro_batches: int) -> None:
        """Let the routers' loss be its mean over all replicas' micro-batches of a step."""
        count = num_micro_batches * self.parallel.size("dp")
        self.config.moe_aux_loss_coeff = self.balancing_coefficient / count

    def global_name(self, name: str) -> str:
        """A parameter's name here, with the numbers of its layer and expert in the whole model."""
        name = _LAYER.sub(lambda m: str(int(m[0]) + self.first_layer), name)
        experts = (self.config.num_moe_experts or 0) // self.config.expert_model_parallel_size
        first_expert = self.parallel.rank("ep") * experts
        return _EXPERT.sub(lambda m: str(int(m[0]) + first_expert), name)

    def global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by `global_name`.

        Of a tied model on several stages the last one has a copy of the embedding under
        `output_layer.weight`; both copies have the same gradient.
        """
        for name, parameter in self.named_parameters():
            yield self.global_name(name), parameter


def build_model(
    policy: PolicyConfig,
    hf_config: Any,
    parallel: Parallel,
    device: torch.device,
    *,
    temperature: float = 1.0,
) -> DistributedDataParallel:
    """This rank's stage, with uninitialised weights, as `module` of what reduces its gradients.

    After `schedule.run` each parameter's `main_grad` is the gradient of the sum of all losses.

    Raises:
        ConfigError: see `transformer_config`.
    """
    config = transformer_config(policy, hf_config)
    stage = Stage(
        config,
        hf_config,
        parallel,
        chunk_size=policy.logprob_chunk_size,
        temperature=temperature,
    )
    stage.to(device)
    _prepare_experts(stage, freeze_router=policy.megatron_cfg.freeze_moe_router)
    keys = policy.megatron_cfg.distributed_data_parallel_config
    overlap = keys.overlap_grad_reduce
    if overlap is None:
        overlap = parallel.size("dp") * parallel.size("cp") > 1
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=keys.grad_reduce_in_fp32, overlap_grad_reduce=overlap
        ),
        stage,
    )
    config.no_sync_func = model.no_sync
    config.finalize_model_grads_func = _finalize
    return model


def _prepare_experts(stage: Stage, *, freeze_router: bool) -> None:
    for name, parameter in stage.named_parameters():
        if ".local_experts." in name:
            # megatron-core says so with expert parallelism only. But experts are shared out over
            # ranks of their own grid always: their copies are not the copies of other weights.
            parameter.allreduce = False
    for module in stage.modules():
        if isinstance(module, TopKRouter):
            module.weight.requires_grad = not freeze_router
            # It would multiply the balancing loss by a count of tokens, as if all gradients were
            # divided by one in the end.
            module.calculate_per_token_loss = False


def _finalize(model: list[Any], num_tokens: Tensor, **groups: Any) -> None:
    """Add up gradients over ranks, and leave them so: losses are divided by global counts."""
    finalize_model_grads(model, None, **groups)
