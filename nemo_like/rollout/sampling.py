"""From logits to tokens: pure functions, the same for every batch a row may be in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nemo_like.errors import ConfigError, DataError
from nemo_like.types import Prompt, SamplingParams

Decode = Callable[[Sequence[int]], str]
"""Text of a completion's token ids, from the tokenizer's owner."""


def check_sampling(sampling: SamplingParams) -> None:
    """Nothing, if these parameters describe a distribution.

    Raises:
        ConfigError: naming every field that does not.
    """
    rules = [
        ("max_new_tokens", sampling.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= sampling.temperature < float("inf"), "0 (greedy) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "more than 0 and at most 1"),
        ("top_k", sampling.top_k is None or sampling.top_k >= 1, "None (all) or at least 1"),
        ("seed", sampling.seed >= 0, "0 or more"),
        ("stop_strings", "" not in sampling.stop_strings, "texts with a character"),
    ]
    faults = [
        f"{name} is {getattr(sampling, name)}, expected {expected}"
        for name, is_right, expected in rules
        if not is_right
    ]
    if faults:
        raise ConfigError("sampling parameters: " + "; ".join(faults))


def room_for(prompt: Prompt, sampling: SamplingParams, *, longest: int, vocab_size: int) -> int:
    """The most tokens that this prompt's completion may have.

    Args:
        prompt: What is to be completed.
        sampling: The wish.
        longest: The most tokens that prompt and completion have together.
        vocab_size: The number of token ids that the model knows.

    Raises:
        DataError: a prompt that is empty, too long, or outside the vocabulary.
    """
    length = len(prompt.token_ids)
    if not 0 < length < longest:
        raise DataError(
            f"prompt {prompt.index} has {length} tokens, expected 1 to {longest - 1}: the rollout "
            f"engine's sequences have at most {longest}. Drop the row, or raise "
            "policy.max_total_sequence_length (and, if the model has no more positions, "
            "policy.hf_config_overrides.max_position_embeddings)."
        )
    low, high = min(prompt.token_ids), max(prompt.token_ids)
    if not 0 <= low <= high < vocab_size:
        raise DataError(
            f"prompt {prompt.index} has token ids from {low} to {high}, expected 0 to "
            f"{vocab_size - 1}: does policy.tokenizer.name belong to policy.model_name?"
        )
    return min(sampling.max_new_tokens, longest - length)


def completes_stop_string(
    token_ids: Sequence[int], decode: Decode, sampling: SamplingParams
) -> bool:
    """Whether the text of these tokens holds a stop string, if it did not one token before.

    A character is at most 4 tokens (its bytes), so only the end of the text is decoded.
    """
    if not sampling.stop_strings:
        return False
    longest = max(map(len, sampling.stop_strings))
    end = decode(token_ids[-4 * (longest + 1) :])
    return any(string in end for string in sampling.stop_strings)


def sampled_distribution(logits_BV: Tensor, sampling: SamplingParams) -> Tensor:
    """Log-probabilities of what tokens are drawn from, -inf for tokens that are left out.

    Temperature first, then top-k (tokens that tie for the last place all stay), then top-p of what
    top-k left, each renormalised. Greedy decoding draws from a point mass, of which there is
    nothing to say: it gets the model's own distribution.

    Units: nats, in fp32.

    Source: top-p is the nucleus of Holtzman et al., https://arxiv.org/abs/1904.09751, section 3.1.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        return logits_BV.log_softmax(-1)
    logprobs_BV = (logits_BV / sampling.temperature).log_softmax(-1)
    if sampling.top_k is not None and sampling.top_k < logprobs_BV.shape[-1]:
        weakest_B1 = logprobs_BV.topk(sampling.top_k).values[:, -1:]
        logprobs_BV = _without(logprobs_BV, logprobs_BV < weakest_B1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logprobs_BV.sort(descending=True)
        probs_BV = sorted_BV.double().exp()
        # A token is in if the likelier ones do not reach top_p without it; so the first always is.
        out_sorted_BV = probs_BV.cumsum(-1) - probs_BV >= sampling.top_p
        out_BV = torch.empty_like(out_sorted_BV).scatter_(-1, order_BV, out_sorted_BV)
        logprobs_BV = _without(logprobs_BV, out_BV)
    return logprobs_BV


def _without(logprobs_BV: Tensor, out_BV: Tensor) -> Tensor:
    return logprobs_BV.masked_fill(out_BV, -torch.inf).log_softmax(-1)


def pick_tokens(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The token of each row at which the cumulative probability passes its number in [0, 1).

    Inverting the distribution by hand, instead of `torch.multinomial`, ties a row's token to its
    own random number: what else is in the batch can not change it. Shapes: [B].
    """
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    total_B = cumulative_BV[:, -1]
    # Strictly below the total, or rounding would pick past the last token that has any probability.
    below_total_B = total_B.nextafter(torch.zeros_like(total_B))
    target_B = torch.minimum(uniforms_B * total_B, below_total_B)
    return torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]


def stream_seed(seed: int, *, prompt_index: int, sample: int) -> int:
    """The seed of one sample of one prompt, for engines that draw by themselves.

    63 bits of numpy's `SeedSequence` of the three numbers.
    """
    state = np.random.SeedSequence([seed, prompt_index, sample]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn of rollouts whose first turn, number 0, has `seed`.

    63 bits of numpy's `SeedSequence` of the two numbers for the later ones.
    """
    if turn == 0:
        return seed
    return int(np.random.SeedSequence([seed, turn]).generate_state(1, np.uint64)[0]) >> 1


def uniforms(seed: int, *, prompt_index: int, sample: int, count: int) -> Tensor:
    """Numbers in [0, 1) that belong to one sample of one prompt.

    A larger count continues a smaller one. Shapes: [count], fp64.
    """
    stream = np.random.default_rng([seed, prompt_index, sample])
    return torch.from_numpy(stream.random(count))
