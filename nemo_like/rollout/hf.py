"""The reference engine: a Hugging Face model and a KV cache in this process.

It is what other engines are measured against, and what answers questions where vLLM would be too
much to start. A rollout depends on weights, prompt and seed, never on the batch it was in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_like.errors import ConfigError
from nemo_like.interfaces import WeightSource
from nemo_like.ops.experts import apart
from nemo_like.rollout.completion import Completion
from nemo_like.rollout.sampling import (
    Decode,
    check_sampling,
    completes_stop_string,
    pick_tokens,
    room_for,
    sampled_distribution,
    uniforms,
)
from nemo_like.rollout.weights import Delivery, ExpectedWeights, held
from nemo_like.types import Prompt, Rollout, SamplingParams, sample_numbers


@dataclass(kw_only=True)
class _Completion(Completion):
    """A completion with its dice."""

    uniforms_T: Tensor


class HFEngine:
    """A `Generator` on a causal LM of `transformers`.

    Args:
        model_config: The content of the model's `config.json`.
        decode: Text of a completion's token ids, stop token included; from the tokenizer's owner.
        dtype: Of weights and computation; log-probabilities are fp32 in any case.
        device: Where the model lives.
        max_model_len: Most tokens of prompt and completion; None is what the model has positions.
        max_num_seqs: Sequences decoded at the same time; bounds the memory of the KV cache.
    """

    def __init__(
        self,
        model_config: Mapping[str, Any],
        decode: Decode,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        from nemo_like.rollout.decoding import ATTENTION

        if "model_type" not in model_config:
            raise ConfigError(
                "the model's config.json has no model_type: is it that of a causal LM?"
            )
        config = AutoConfig.for_model(**model_config)
        # Random weights would cost time, and draw from the generator that training draws from.
        with no_init_weights(), torch.device(device):
            self._model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION
            )
        self._model.tie_weights()
        self._model.eval()
        self._config = self._model.config
        self._longest = min(
            self._config.max_position_embeddings,
            max_model_len or self._config.max_position_embeddings,
        )
        self._decode = decode
        self._device = torch.device(device)
        self._max_num_seqs = max_num_seqs
        self._applied = 0
        self._version: int | None = None
        self._synced: tuple[WeightSource, int] | None = None

    def sync(self, policy: WeightSource) -> None:
        """Take the policy's weights of now, as the next version, if they are not these."""
        offered = (policy, policy.weights_version)
        if self._version is None or offered != self._synced:
            self.load_weights(policy.export_weights(), version=self._applied + 1)
            self._synced = offered

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> str:
        """Take whole tensors by Hugging Face name, all of the model's; the digest of what came.

        Of tied weights one name is enough; when both come they must be equal.

        Raises:
            CheckpointError: naming what is missing, unknown, twice there, or of the wrong shape.
                The engine then holds a mixture, and refuses to generate until a whole set arrives.
        """
        self._version = self._synced = None
        parameters = dict(apart(self._model.state_dict().items()))
        delivery = Delivery(ExpectedWeights.of(self._model))
        for name, tensor in delivery.fitting(weights):
            parameters[name].copy_(tensor)
        digest = delivery.digest(version)
        self._version = self._applied = version
        return digest

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        samples: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in the order of the prompts.

        Each has the random stream of (seed, index of the prompt, number of the sample), so the
        samples of a group differ, and each is the same in whatever company it is drawn. `samples`
        are these numbers for a part of a longer list; None counts them here. One that reaches the
        longest length ends there with `length`.

        Raises:
            CheckpointError: no whole set of weights was loaded.
            ConfigError: sampling parameters that make no sense.
            DataError: a prompt that is empty, too long, or outside the vocabulary.
            NonFiniteError: the model's logits are not numbers.
        """
        version = held(self._version)
        check_sampling(sampling)
        numbers = sample_numbers(prompts) if samples is None else samples
        rows = [self._start(p, k, sampling) for p, k in zip(prompts, numbers, strict=True)]
        # Rows of like length share a batch, so little of it is padding; those of one prompt share
        # its way through the model.
        by_length = sorted(rows, key=lambda row: (len(row.prompt.token_ids), row.prompt.token_ids))
        for first in range(0, len(rows), self._max_num_seqs):
            self._complete(by_length[first : first + self._max_num_seqs], sampling)
        return [row.rollout(self._decode, version) for row in rows]

    def close(self) -> None:
        """Release the weights; safe to call twice."""
        self._version = None
        self._model = self._model.to("meta")

    def _start(self, prompt: Prompt, sample: int, sampling: SamplingParams) -> _Completion:
        room = room_for(prompt, sampling, longest=self._longest, vocab_size=self._config.vocab_size)
        dice = uniforms(sampling.seed, prompt_index=prompt.index, sample=sample, count=room)
        return _Completion(prompt=prompt, room=room, uniforms_T=dice)

    def _complete(self, rows: Sequence[_Completion], sampling: SamplingParams) -> None:
        """Decode until the last row has ended; an ended row leaves batch and cache at once."""
        from nemo_like.rollout.decoding import growing_cache

        place = {ids: b for b, ids in enumerate(dict.fromkeys(r.prompt.token_ids for r in rows))}
        ids_BT, mask_BT = _pad_left(list(place), self._device)
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        cache = growing_cache(self._config)
        logits_BV = self._next_logits(ids_BT, mask_BT, positions_BT, cache)
        # So far the batch was of prompts, and now it is of samples.
        begun_B = torch.tensor([place[row.prompt.token_ids] for row in rows], device=self._device)
        logits_BV, mask_BT = logits_BV.index_select(0, begun_B), mask_BT.index_select(0, begun_B)
        positions_B1 = positions_BT[:, -1:].index_select(0, begun_B)
        cache.batch_select_indices(begun_B)
        while True:
            tokens_B = _extend(rows, logits_BV, sampling)
            alive = [b for b, row in enumerate(rows) if not self._has_ended(row, sampling)]
            if not alive:
                return
            if len(alive) < len(rows):
                keep_B = torch.tensor(alive, dtype=torch.int64, device=self._device)
                rows = [rows[b] for b in alive]
                tokens_B, mask_BT, positions_B1 = (
                    x.index_select(0, keep_B) for x in (tokens_B, mask_BT, positions_B1)
                )
                cache.batch_select_indices(keep_B)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=-1)
            positions_B1 = positions_B1 + 1
            logits_BV = self._next_logits(tokens_B[:, None], mask_BT, positions_B1, cache)

    def _next_logits(
        self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Any
    ) -> Tensor:
        """The logits of what follows the last of these tokens. Shapes: [B, V]."""
        logits: Tensor = self._model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def _has_ended(self, row: _Completion, sampling: SamplingParams) -> bool:
        if row.token_ids[-1] in sampling.stop_token_ids or completes_stop_string(
            row.token_ids, self._decode, sampling
        ):
            row.finish_reason = "stop"
            return True
        return len(row.token_ids) >= row.room


def _extend(rows: Sequence[_Completion], logits_BV: Tensor, sampling: SamplingParams) -> Tensor:
    """The next token of every row, after writing it down with its log-probability. Shapes: [B]."""
    logprobs_BV = sampled_distribution(logits_BV, sampling)
    if sampling.temperature == 0:
        tokens_B = logprobs_BV.argmax(-1)
    else:
        dice_B = torch.stack([row.uniforms_T[len(row.token_ids)] for row in rows])
        tokens_B = pick_tokens(logprobs_BV, dice_B.to(logprobs_BV.device))
    tokens_B = tokens_B.clamp(max=logprobs_BV.shape[-1] - 1)  # of rows with NaN, refused just below
    chosen_B = logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]
    for row, token, logprob in zip(rows, tokens_B.tolist(), chosen_B.tolist(), strict=True):
        row.add(token, logprob)
    return tokens_B


def _pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids with padding in front, and a mask that is 0 on the padding. Shapes: [B, T] each.

    In front, because then every row's next token is in the same column; the mask hides the rest.
    """
    width = max(len(s) for s in sequences)
    ids_BT = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences], device=device)
    lengths_B = torch.tensor([len(s) for s in sequences], device=device)
    columns_T = torch.arange(width, device=device)
    return ids_BT, (columns_T >= (width - lengths_B)[:, None]).long()
