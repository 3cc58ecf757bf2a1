import math
import pickle
import random
from dataclasses import replace
from math import log, sqrt

import pytest
import torch

from nemo_like.config.loss import ClippedPGConfig
from nemo_like.losses.clipped_pg import ClippedPG
from nemo_like.observability.metrics import flatten, reduce
from nemo_like.types import TrainBatch
from tests.reference import policy_gradient_by_hand as by_hand


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def clipped_pg(**settings):
    return ClippedPG(ClippedPGConfig(**{"reference_policy_kl_penalty": 0.0, **settings}))


# Two completions after prompts of one token: "ab" with advantage 1, and "c" with advantage -2.
# a, b, c have the ratios 3/2, 1/2, 1/2 to the old policy, and old / engine is 3, 1/2, 1.
LOGPROBS_N = tensor(0, -1, -2, 0, -3)
RATIO_N = tensor(1, 1.5, 0.5, 1, 0.5)
WEIGHT_N = tensor(1, 3, 0.5, 1, 1)
OLD_N = LOGPROBS_N - RATIO_N.log()
BATCH = TrainBatch(
    token_ids_N=torch.tensor([0, 1, 2, 0, 3]),
    loss_mask_N=torch.tensor([False, True, True, False, True]),
    lengths_B=torch.tensor([3, 2]),
    num_loss_tokens=3,
    num_sequences=2,
    advantages_N=tensor(0, 1, 1, 0, -2),
    old_logprobs_N=OLD_N,
    sampled_logprobs_N=OLD_N - WEIGHT_N.log(),
    ref_logprobs_N=LOGPROBS_N + tensor(0, log(2), 0, 0, -log(4)),
)


def value(batch=BATCH, logprobs_N=LOGPROBS_N, **settings):
    return float(clipped_pg(**settings)(logprobs_N, batch)[0])


def slopes(loss, batch=BATCH, logprobs_N=LOGPROBS_N):
    logprobs_N = logprobs_N.clone().requires_grad_()
    loss(logprobs_N, batch)[0].backward()
    return logprobs_N.grad


CORRECTED = {"use_importance_sampling_correction": True}


def truncated(kind, low, high):
    return {
        **CORRECTED,
        "truncated_importance_sampling_type": kind,
        "truncated_importance_sampling_ratio_min": low,
        "truncated_importance_sampling_ratio": high,
    }


GSPO = {"sequence_level_importance_ratios": True, "token_level_loss": False}

BY_HAND = {
    # a: -min(1.5, 1.2), b: -min(0.5, 0.8), c: 2 max(0.5, 0.8)
    "clip": ({}, (-1.2 - 0.5 + 1.6) / 3),
    "clip higher": ({"ratio_clip_max": 0.28}, (-1.28 - 0.5 + 1.6) / 3),
    "clip lower": ({"ratio_clip_min": 0.6}, (-1.2 - 0.5 + 1.0) / 3),
    "mean per sequence": ({"token_level_loss": False}, ((-1.2 - 0.5) / 2 + 1.6) / 2),
    "Dr. GRPO": ({"loss_divisor_tokens": 4}, (-1.2 - 0.5 + 1.6) / (2 * 4)),
    # ratios sqrt(1.5 * 0.5) and 0.5
    "GSPO": (GSPO, (-sqrt(0.75) + 1.6) / 2),
    # -A clip(r) logprob
    "CISPO": ({"use_cispo": True}, (1.2 * 1 + 0.8 * 2 - 2 * 0.8 * 3) / 3),
    "no ratio": ({"disable_ppo_ratio": True}, (1 + 2 - 2 * 3) / 3),
    "ratio 1": ({"force_on_policy_ratio": True}, (-1 - 1 + 2) / 3),
    "correction": (CORRECTED, (-1.2 * 3 - 0.5 * 0.5 + 1.6) / 3),
    "tis": (truncated("tis", 0.6, 2.0), (-1.2 * 2 - 0.5 * 0.6 + 1.6) / 3),
    "icepop": (truncated("icepop", 0.6, 2.0), (0 + 0 + 1.6) / 3),
    "icepop without lower bound": (truncated("icepop", None, 2.0), (-0.5 * 0.5 + 1.6) / 3),
    # "ab" has the geometric mean sqrt(3 * 0.5) = 1.22
    "sequence inside": (truncated("seq-mask-tis", 0.9, 1.3), (-3.6 - 0.25 + 1.6) / 3),
    "sequence outside": (truncated("seq-mask-tis", 0.9, 1.2), (0 + 0 + 1.6) / 3),
    "sequence weights": (GSPO | CORRECTED, (-sqrt(0.75) * 1.5 + 1.6) / 2),
    "sequence weights, tis": (GSPO | truncated("tis", None, 1.25), (-sqrt(0.75) * 1.25 + 1.6) / 2),
}


@pytest.mark.parametrize(("settings", "expected"), BY_HAND.values(), ids=BY_HAND.keys())
def test_the_loss_is_what_one_computes_by_hand(settings, expected):
    assert value(**settings) == pytest.approx(expected, abs=1e-12)


def test_the_dual_clip_bounds_what_a_bad_token_made_likely_costs():
    batch = replace(BATCH, old_logprobs_N=LOGPROBS_N - tensor(1, 1.5, 0.5, 1, 5).log())
    assert value(batch) == pytest.approx((-1.2 - 0.5 + 2 * 5) / 3)
    assert value(batch, ratio_clip_c=3.0) == pytest.approx((-1.2 - 0.5 + 2 * 3) / 3)
    assert slopes(clipped_pg(), batch)[4] == pytest.approx(10 / 3)
    assert slopes(clipped_pg(ratio_clip_c=3.0), batch)[4] == 0


# ref / present is 2, 1, 1/4 for a, b, c.
KL_BY_HAND = {
    "k1": -log(2) + 0 + log(4),
    "k2": log(2) ** 2 / 2 + 0 + log(4) ** 2 / 2,
    "k3": (1 - log(2)) + 0 + (-0.75 + log(4)),
}


@pytest.mark.parametrize(("kind", "expected"), KL_BY_HAND.items())
def test_the_kl_penalty_is_added_in_the_same_mean(kind, expected):
    settings = {"reference_policy_kl_penalty": 0.1, "reference_policy_kl_type": kind}
    assert value(**settings) - value() == pytest.approx(0.1 * expected / 3)
    assert value(**settings, use_kl_in_reward=True) == value()


def test_the_kl_penalty_weighs_each_token_by_policy_over_engine_if_asked():
    settings = {"reference_policy_kl_penalty": 0.1, "use_on_policy_kl_approximation": True}
    # policy / engine = ratio * weight = 4.5, 0.25, 0.5
    expected = 4.5 * (1 - log(2)) + 0 + 0.5 * (-0.75 + log(4))
    assert value(**settings) - value() == pytest.approx(0.1 * expected / 3)


SETTINGS = {
    **{name: settings for name, (settings, _) in BY_HAND.items()},
    "dual clip": {"ratio_clip_c": 1.3, "ratio_clip_max": 0.1},
    "GSPO, icepop": GSPO | truncated("icepop", 0.5, 2.0),
    "CISPO, tis": {"use_cispo": True, **truncated("tis", None, 2.0)},
    **{
        f"KL {kind}": {"reference_policy_kl_penalty": 0.3, "reference_policy_kl_type": kind}
        for kind in ("k1", "k2", "k3")
    },
    "KL clamped": {
        "reference_policy_kl_penalty": 0.3,
        "kl_input_clamp_value": 0.8,
        "kl_output_clamp_value": 0.2,
    },
    "KL of clamped input": {
        "reference_policy_kl_penalty": 0.3,
        "kl_input_clamp_value": 0.5,
        "kl_output_clamp_value": None,
    },
    "KL unclamped": {
        "reference_policy_kl_penalty": 0.3,
        "kl_input_clamp_value": None,
        "kl_output_clamp_value": None,
    },
    "KL of the policy": {
        "reference_policy_kl_penalty": 0.3,
        "use_on_policy_kl_approximation": True,
        "token_level_loss": False,
        "kl_output_clamp_value": 0.2,
    },
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def random_sequences(seed=3, count=9):
    dice = random.Random(seed)
    sequences = []
    for i in range(count):
        n = 0 if i == 4 else dice.randint(1, 6)  # one was taken out
        rows = [[dice.gauss(-2, 0.5) for _ in range(n)] for _ in range(4)]
        sequences.append(by_hand.Sequence(*rows, advantage=dice.gauss(0, 1)))
    return sequences


def as_batch(sequences, prompt=2, taken_out=3):
    """With prompts of two tokens; a sequence without counted tokens has three others."""
    layout = [
        ([0.0] * prompt, s.logprobs or [0.0] * taken_out, bool(s.logprobs)) for s in sequences
    ]

    def laid_out(values):
        rows = zip(layout, values, strict=True)
        return tensor(*(x for (p, c, _), v in rows for x in [*p, *(v or [0.0] * len(c))]))

    counted = [s for s in sequences if s.logprobs]
    lengths_B = torch.tensor([len(p) + len(c) for p, c, _ in layout])
    batch = TrainBatch(
        token_ids_N=torch.zeros(int(lengths_B.sum()), dtype=torch.int64),
        loss_mask_N=torch.tensor(
            [m for p, c, k in layout for m in [False] * len(p) + [k] * len(c)]
        ),
        lengths_B=lengths_B,
        num_loss_tokens=sum(len(s.logprobs) for s in counted),
        num_sequences=len(counted),
        advantages_N=laid_out([[s.advantage] * len(s.logprobs) for s in sequences]),
        old_logprobs_N=laid_out([s.old for s in sequences]),
        sampled_logprobs_N=laid_out([s.sampled for s in sequences]),
        ref_logprobs_N=laid_out([s.ref for s in sequences]),
    )
    return batch, laid_out([s.logprobs for s in sequences])


@each_setting
def test_value_and_gradient_are_those_of_the_slow_twin(settings):
    sequences = random_sequences()
    batch, logprobs_N = as_batch(sequences)
    loss = clipped_pg(**settings)
    expected, derivative = by_hand.loss(loss.config, sequences)
    assert float(loss(logprobs_N, batch)[0]) == pytest.approx(expected, abs=1e-13)
    found = slopes(loss, batch, logprobs_N)
    flat = tensor(*(x for row in derivative for x in row))
    torch.testing.assert_close(found[batch.loss_mask_N], flat, rtol=1e-12, atol=1e-14)
    assert not found[~batch.loss_mask_N].any()


@each_setting
@pytest.mark.parametrize(
    "parts", [[range(9)], [[i] for i in range(9)], [[8, 1, 4], [], [0, 2, 3, 7, 6, 5]]]
)
def test_shares_gradients_and_metrics_of_any_split_add_up_to_those_of_the_batch(settings, parts):
    batch, logprobs_N = as_batch(random_sequences())
    loss = clipped_pg(**settings)
    whole, metrics = loss(logprobs_N, batch)
    total, gradient_N, collected = 0.0, torch.zeros_like(logprobs_N), []
    for rows in parts:
        index = batch.token_index(rows)
        part_N = logprobs_N[index].requires_grad_()
        share, part_metrics = loss(part_N, batch.select(list(rows)))
        share.backward()
        total += share.item()
        gradient_N[index] = part_N.grad
        collected.append(part_metrics)
    assert total == pytest.approx(float(whole), abs=1e-13)
    torch.testing.assert_close(gradient_N, slopes(loss, batch, logprobs_N), rtol=1e-12, atol=1e-15)
    together = reduce(collected)
    assert together.keys() == metrics.keys()
    for name, metric in metrics.items():
        assert together[name].value == pytest.approx(metric.value, abs=1e-12), name


@each_setting
def test_a_sequence_taken_out_is_as_if_it_had_never_been_there(settings):
    batch, logprobs_N = as_batch(random_sequences())
    rows = [0, 1, 2, 3, 5, 6, 7, 8]
    poison_N = torch.full_like(logprobs_N, float("nan"))
    mask_N = batch.loss_mask_N
    dirty = replace(
        batch,
        **{
            name: torch.where(mask_N, getattr(batch, name), poison_N)
            for name in ("old_logprobs_N", "sampled_logprobs_N", "ref_logprobs_N")
        },
    )
    loss = clipped_pg(**settings)
    found, metrics = loss(torch.where(mask_N, logprobs_N, poison_N), dirty)
    kept, kept_metrics = loss(logprobs_N[batch.token_index(rows)], batch.select(rows))
    assert float(found) == pytest.approx(float(kept), abs=1e-14)
    assert flatten(metrics) == pytest.approx(flatten(kept_metrics), abs=1e-13)
    assert slopes(loss, dirty, logprobs_N).isfinite().all()


@each_setting
def test_without_old_logprobs_the_old_policy_is_the_present_one(settings):
    batch, logprobs_N = as_batch(random_sequences())
    loss = clipped_pg(**settings)
    absent = replace(batch, old_logprobs_N=None)
    equal = replace(batch, old_logprobs_N=logprobs_N)
    assert loss(logprobs_N, absent) == loss(logprobs_N, equal)
    has_ratio = not settings.get("disable_ppo_ratio", False)
    forced = clipped_pg(**settings | {"force_on_policy_ratio": has_ratio})
    for other, b in ((loss, equal), (forced, absent)):
        assert torch.equal(slopes(loss, absent, logprobs_N), slopes(other, b, logprobs_N))
    assert slopes(loss, absent, logprobs_N).any()


def test_in_fp32_the_loss_is_that_of_fp64_to_round_off():
    batch, logprobs_N = as_batch(random_sequences(count=40))
    names = ("advantages_N", "old_logprobs_N", "sampled_logprobs_N", "ref_logprobs_N")
    single = replace(batch, **{name: getattr(batch, name).float() for name in names})
    for settings in SETTINGS.values():
        loss, exact = (
            clipped_pg(**settings)(x, b)[0]
            for x, b in ((logprobs_N.float(), single), (logprobs_N, batch))
        )
        assert loss.dtype == torch.float32
        assert float(loss) == pytest.approx(float(exact), abs=3e-6)


def test_a_nan_that_counts_makes_the_loss_nan_whatever_the_bounds():
    nan_N = torch.where(torch.arange(5) == 1, torch.nan, BATCH.sampled_logprobs_N)
    batch = replace(BATCH, sampled_logprobs_N=nan_N)
    for kind in ("tis", "icepop", "seq-mask-tis"):
        assert math.isnan(value(batch, **truncated(kind, 0.5, 2.0))), kind


def test_an_infinite_weight_is_out_of_bounds_like_any_large_one():
    impossible_N = torch.where(torch.arange(5) == 1, -torch.inf, BATCH.sampled_logprobs_N)
    batch = replace(BATCH, sampled_logprobs_N=impossible_N)
    assert value(batch, **truncated("tis", None, 2.0)) == pytest.approx((-2.4 - 0.25 + 1.6) / 3)
    assert value(batch, **truncated("icepop", None, 2.0)) == pytest.approx((-0.25 + 1.6) / 3)
    assert math.isinf(value(batch, **CORRECTED))


def test_the_gradient_stops_where_the_clip_takes_over():
    # a (ratio 1.5, good) and c (ratio 0.5, bad) are clipped; b has -A r / 3
    assert slopes(clipped_pg()).tolist() == pytest.approx([0, 0, -0.5 / 3, 0, 0])
    # CISPO leaves no token out: -A clip(r) / 3
    expected = [0, -1.2 / 3, -0.8 / 3, 0, 2 * 0.8 / 3]
    assert slopes(clipped_pg(use_cispo=True)).tolist() == pytest.approx(expected)


def test_metrics_are_what_one_computes_by_hand():
    settings = {**truncated("tis", None, 2.0), "reference_policy_kl_penalty": 0.1}
    _, metrics = clipped_pg(**settings)(LOGPROBS_N, BATCH)
    values = flatten(metrics)

    def js(r):
        return (r * log(r) - (1 + r) * log((1 + r) / 2)) / 2

    assert values == pytest.approx(
        {
            "token_mult_prob_error": (3 + 2 + 1) / 3,
            "token_mult_prob_error_max": 3,
            "gen_kl_error": ((3 - 1 - log(3)) + (0.5 - 1 - log(0.5))) / 3,
            "policy_kl_error": ((1 / 3 - 1 + log(3)) + (2 - 1 - log(2))) / 3,
            "js_divergence_error": (js(3) + js(0.5)) / 3,
            # -(policy / engine) * logprob
            "approx_entropy": (4.5 * 1 + 0.25 * 2 + 0.5 * 3) / 3,
            "probs_ratio": (1.5 + 0.5 + 0.5) / 3,
            "probs_ratio_min": 0.5,
            "probs_ratio_max": 1.5,
            "probs_ratio_clamped": (1.2 + 0.8 + 0.8) / 3,
            "probs_ratio_clamped_min": 0.8,
            "probs_ratio_clamped_max": 1.2,
            "clip_fraction_low": 1 / 3,
            "clip_fraction_high": 1 / 3,
            "kl_penalty": ((1 - log(2)) + (-0.75 + log(4))) / 3,
            "sampling_importance_ratio": (2 + 0.5 + 1) / 3,
            "is_oob_ratio": 1 / 3,
            "num_valid_samples": 2,
        }
    )
    reductions = {name: metric.reduction for name, metric in metrics.items()}
    assert reductions.pop("num_valid_samples") == "sum"
    assert all(reductions[name] == name[-3:] for name in values if name[-4:] in ("_min", "_max"))
    means = [name for name, reduction in reductions.items() if reduction == "mean"]
    assert len(means) == 12 and {metrics[name].weight for name in means} == {3}


def test_clip_fractions_count_the_tokens_that_a_clip_acts_on():
    cases = [(2, 1)] * 1 + [(2, -1)] * 2 + [(0.5, 1)] * 3 + [(0.5, -1)] * 4 + [(2, 0), (0.5, 0)]
    ratio_N = tensor(1, *(ratio for ratio, _ in cases))
    batch = TrainBatch(
        token_ids_N=torch.zeros(13, dtype=torch.int64),
        loss_mask_N=torch.arange(13) > 0,
        lengths_B=torch.tensor([13]),
        num_loss_tokens=12,
        num_sequences=1,
        advantages_N=tensor(0, *(advantage for _, advantage in cases)),
        old_logprobs_N=-ratio_N.log(),
        sampled_logprobs_N=-ratio_N.log(),
    )

    def fractions(**settings):
        values = flatten(clipped_pg(**settings)(torch.zeros_like(ratio_N), batch)[1])
        return [12 * values["clip_fraction_low"], 12 * values["clip_fraction_high"]]

    assert fractions() == pytest.approx([4, 1])
    assert fractions(ratio_clip_max=1.5) == pytest.approx([4, 0])
    assert fractions(use_cispo=True) == pytest.approx([3 + 4, 1 + 2])


def test_divergence_metrics_are_the_divergences_in_expectation():
    """A vocabulary of three, each token as often as the engine draws it: 2, 1, 1 of 4."""
    engine, trained = (0.5, 0.25, 0.25), (0.2, 0.5, 0.3)
    drawn = [0, 0, 1, 2]
    old_N = tensor(0, *(log(trained[v]) for v in drawn))
    batch = TrainBatch(
        token_ids_N=torch.tensor([0, *drawn]),
        loss_mask_N=torch.tensor([False, True, True, True, True]),
        lengths_B=torch.tensor([5]),
        num_loss_tokens=4,
        num_sequences=1,
        advantages_N=torch.zeros(5),
        sampled_logprobs_N=tensor(0, *(log(engine[v]) for v in drawn)),
    )
    _, metrics = clipped_pg()(old_N, batch)

    def divergence(p, q):
        return sum(x * log(x / y) for x, y in zip(p, q, strict=True))

    mixture = [(x + y) / 2 for x, y in zip(engine, trained, strict=True)]
    js = (divergence(engine, mixture) + divergence(trained, mixture)) / 2
    assert metrics["gen_kl_error"].value == pytest.approx(divergence(engine, trained))
    assert metrics["js_divergence_error"].value == pytest.approx(js)
    entropy = -sum(p * log(p) for p in trained)
    assert metrics["approx_entropy"].value == pytest.approx(entropy)


def test_a_disabled_ratio_has_no_clip_to_report():
    _, metrics = clipped_pg(disable_ppo_ratio=True)(LOGPROBS_N, BATCH)
    assert not [name for name in metrics if "clip" in name or "clamped" in name]


def test_the_loss_travels_to_workers():
    loss = clipped_pg(ratio_clip_max=0.28)
    again = pickle.loads(pickle.dumps(loss))
    assert again == loss
    assert again(LOGPROBS_N, BATCH)[0] == loss(LOGPROBS_N, BATCH)[0]
