from math import exp, log

import pytest
import torch

from nemo_like.ops.kl import kl_estimate, kl_loss, penalize

KINDS = ("k1", "k2", "k3")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"), [("k1", -log(3)), ("k2", log(3) ** 2 / 2), ("k3", 2 - log(3))]
)
def test_each_estimator_is_schulmans(kind, expected):
    """The other policy holds the token for three times as likely."""
    assert kl_estimate(tensor(-2), tensor(-2 + log(3)), kind).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_the_divergence_in_expectation(kind):
    policy, other = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    estimate = (policy * kl_estimate(policy.log(), other.log(), kind)).sum()
    assert float(estimate) == pytest.approx(float((policy * (policy / other).log()).sum()))


def test_k3_of_two_policies_that_almost_agree_does_not_drown_in_round_off():
    found = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0 + 2**-12]), "k3")
    assert float(found) == pytest.approx(exp(2**-12) - 1 - 2**-12, rel=1e-2)


def test_the_input_clamp_bounds_the_log_ratio_on_both_sides():
    far = tensor(-50, -50 - 2 * 50)
    assert kl_estimate(tensor(-80, -80), far, "k1", input_clamp=20.0).tolist() == [-20, 20]


def slope(kind, gap, **options):
    logprobs = tensor(-2.0).requires_grad_()
    value = kl_loss(logprobs, tensor(-2.0 + gap), kind, **options)
    value.sum().backward()
    return value.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("kind", "value", "own_slope"),
    [("k1", -0.5, 1.0), ("k2", 0.125, -0.5), ("k3", exp(0.5) - 1.5, 1 - exp(0.5))],
)
def test_the_gradient_has_the_estimates_part_and_that_of_drawing_the_token(kind, value, own_slope):
    assert slope(kind, 0.5) == pytest.approx((value, own_slope + value))
    weighted = slope(kind, 0.5, sampled_logprobs=tensor(-2.0 - log(4)))
    assert weighted == pytest.approx((4 * value, 4 * (own_slope + value)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clamp", [{"input_clamp": 0.4}, {"output_clamp": 0.05}])
def test_where_a_clamp_acts_there_is_no_gradient(kind, clamp):
    value, gradient = slope(kind, 0.5, **clamp)
    bounded = {"k1": -0.4, "k2": 0.08, "k3": exp(0.4) - 1.4}[kind]
    expected = bounded if "input_clamp" in clamp else max(min(slope(kind, 0.5)[0], 0.05), -0.05)
    assert value == pytest.approx(expected)
    assert gradient == 0


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_loss_has_the_gradient_of_the_divergence_in_expectation(kind):
    """A softmax policy over three tokens; the estimate alone would miss a part, or all, of it."""
    logits = tensor(0.3, -0.2, 0.5).requires_grad_()
    ref = tensor(0.2, 0.5, 0.3).log()
    logprobs = logits.log_softmax(0)
    drawn = logprobs.exp().detach()
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    loss = (drawn * kl_loss(logprobs, ref, kind)).sum()
    # tokens of another engine, weighed by policy / engine
    engine = tensor(0.6, 0.1, 0.3)
    weighed = (engine * kl_loss(logprobs, ref, kind, sampled_logprobs=engine.log())).sum()
    alone = (drawn * kl_estimate(logprobs, ref, kind)).sum()
    gradients = [
        torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (exact, loss, weighed, alone)
    ]
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    assert (gradients[3] - gradients[0]).abs().max() > 0.01


def test_a_token_pays_for_the_kl_from_itself_to_the_end_of_its_sequence():
    kl_N = tensor(0, 1, 2, 4, 0, 8, 16)
    lengths_B = torch.tensor([4, 0, 3])
    found = penalize(torch.ones(7, dtype=torch.float64), kl_N, lengths_B, coefficient=0.5)
    assert found.tolist() == [1 - 3.5, 1 - 3.5, 1 - 3, 1 - 2, 1 - 12, 1 - 12, 1 - 8]
