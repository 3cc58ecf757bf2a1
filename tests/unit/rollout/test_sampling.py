from __future__ import annotations

import math

import pytest
import torch

from nemo_like.errors import ConfigError
from nemo_like.rollout.sampling import (
    check_sampling,
    completes_stop_string,
    pick_tokens,
    sampled_distribution,
    stream_seed,
    uniforms,
)
from nemo_like.types import SamplingParams

PROBS = torch.tensor([[0.5, 0.05, 0.3, 0.15], [0.05, 0.15, 0.3, 0.5]])


def params(**fields) -> SamplingParams:
    return SamplingParams(max_new_tokens=4, **fields)


def probabilities(logits, **fields) -> list[list[float]]:
    return sampled_distribution(logits, params(**fields)).exp().tolist()


def test_temperature_divides_the_logits():
    logits = torch.randn(3, 7)
    expected = (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(sampled_distribution(logits, params(temperature=0.7)), expected)


def test_greedy_decoding_reports_the_models_own_distribution():
    logits = torch.randn(3, 7)
    assert torch.equal(
        sampled_distribution(logits, params(temperature=0, top_k=2, top_p=0.1)),
        logits.log_softmax(-1),
    )


def test_log_probabilities_are_fp32_also_of_bf16_logits():
    assert sampled_distribution(torch.randn(1, 5).bfloat16(), params()).dtype == torch.float32


def test_top_k_keeps_the_k_likeliest_renormalised():
    assert probabilities(PROBS.log(), top_k=2) == [
        pytest.approx([0.625, 0, 0.375, 0]),
        pytest.approx([0, 0, 0.375, 0.625]),
    ]


@pytest.mark.parametrize(
    ("top_p", "first_row"),
    [
        (0.4, [1, 0, 0, 0]),
        (0.6, [0.625, 0, 0.375, 0]),
        (0.9, [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95]),
        (1.0, [0.5, 0.05, 0.3, 0.15]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, first_row):
    assert probabilities(PROBS.log(), top_p=top_p)[0] == pytest.approx(first_row)


def test_top_p_judges_what_top_k_left():
    # Of {0.5, 0.3} renormalised the first holds 0.625: enough for p = 0.6. Of all four it is not.
    assert probabilities(PROBS.log(), top_k=2, top_p=0.6)[0] == pytest.approx([1, 0, 0, 0])


def test_picked_tokens_invert_the_distribution():
    logprobs = PROBS[:1].log().expand(5, -1)
    picked = pick_tokens(logprobs, torch.tensor([0.0, 0.49, 0.52, 0.84, 0.86], dtype=torch.float64))
    assert picked.tolist() == [0, 0, 1, 2, 3]


def test_a_token_without_probability_is_never_picked():
    logprobs = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log().expand(3, -1)
    almost_one = 1 - 2.0**-53
    assert pick_tokens(logprobs, torch.tensor([0.0, 0.5, almost_one]).double()).tolist() == [
        1,
        2,
        2,
    ]


def test_drawn_frequencies_are_those_of_the_distribution():
    count = 20_000
    dice = uniforms(3, prompt_index=5, sample=0, count=count)
    picked = pick_tokens(PROBS[:1].log().expand(count, -1), dice)
    shares = torch.bincount(picked, minlength=4) / count
    for share, p in zip(shares.tolist(), PROBS[0].tolist(), strict=True):
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_a_longer_stream_continues_a_shorter_one_and_streams_differ():
    short = uniforms(1, prompt_index=2, sample=0, count=5)
    assert torch.equal(uniforms(1, prompt_index=2, sample=0, count=50)[:5], short)
    for index, sample in ((2, 1), (3, 0)):
        other = uniforms(1, prompt_index=index, sample=sample, count=5)
        assert not torch.equal(other, short)
    assert not torch.equal(uniforms(2, prompt_index=2, sample=0, count=5), short)


def test_every_senseless_parameter_is_named():
    with pytest.raises(ConfigError) as refusal:
        check_sampling(SamplingParams(0, temperature=-1, top_p=0, top_k=0, seed=-1))
    for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed"):
        assert name in str(refusal.value)
    with pytest.raises(ConfigError, match="temperature is nan"):
        check_sampling(params(temperature=float("nan")))
    check_sampling(params(temperature=0))


def utf8(token_ids) -> str:
    return bytes(token_ids).decode(errors="replace")


@pytest.mark.parametrize("string", ["ends", "e", "\N{GRINNING FACE}!", "x\N{EURO SIGN}"])
def test_a_stop_string_is_seen_at_the_token_that_completes_it_and_at_none_before(string):
    tokens = [*("some text, and now \N{GRINNING FACE} ".replace("e", "").encode() * 50)]
    tokens += string.encode()
    sampling = params(stop_strings=("never said", string))
    found = [
        n for n in range(1, len(tokens) + 1) if completes_stop_string(tokens[:n], utf8, sampling)
    ]
    assert found == [len(tokens)]
    assert not completes_stop_string(tokens, utf8, params())


def test_each_sample_of_each_prompt_has_a_seed_of_its_own_under_large_seeds_too():
    seeds = {
        stream_seed(seed, prompt_index=index, sample=sample)
        for seed in (0, 1, 1 << 40, (7 << 40) + (3 << 12))
        for index in range(20)
        for sample in range(20)
    }
    assert len(seeds) == 4 * 20 * 20
    assert 1 << 60 < max(seeds) < 1 << 63 and min(seeds) >= 0
    assert stream_seed(1, prompt_index=2, sample=3) == stream_seed(1, prompt_index=2, sample=3)
