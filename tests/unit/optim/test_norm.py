from __future__ import annotations

import math

import pytest
import torch

from nemo_like.optim.norm import clip_gradients


def group(params: list[torch.Tensor], **settings) -> dict:
    return {"params": params, "copies": [1] * len(params)} | settings


def parameters(*gradients: torch.Tensor | None) -> list[torch.Tensor]:
    made = []
    for gradient in gradients:
        p = torch.zeros(3 if gradient is None else gradient.shape, requires_grad=True)
        p.grad = gradient
        made.append(p)
    return made


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_is_that_of_torch(max_norm):
    gradients = [torch.randn(4, 5), torch.randn(7), None]
    ours = parameters(*[g if g is None else g.clone() for g in gradients])
    theirs = parameters(*[g if g is None else g.clone() for g in gradients])
    norm = clip_gradients([group(ours)], max_norm)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, max_norm)))
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_without_a_limit_it_only_measures():
    (p,) = parameters(torch.full((4,), 3.0))
    assert clip_gradients([group([p])], None) == 6.0
    assert torch.equal(p.grad, torch.full((4,), 3.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_nothing_is_scaled(bad):
    good, broken = parameters(torch.ones(4), torch.tensor([1.0, bad]))
    assert not math.isfinite(clip_gradients([group([good, broken])], 0.1))
    assert torch.equal(good.grad, torch.ones(4))


def test_no_gradients_have_no_norm():
    assert clip_gradients([group(parameters(None))], 1.0) == 0.0


def test_a_group_that_is_not_clipped_counts_in_the_norm_and_keeps_its_gradients():
    scaled, spared = parameters(torch.full((4,), 3.0), torch.full((4,), 4.0))
    groups = [group([scaled]), group([spared], clip=False)]
    assert clip_gradients(groups, 1.0) == 10.0
    torch.testing.assert_close(scaled.grad, torch.full((4,), 0.3))
    assert torch.equal(spared.grad, torch.full((4,), 4.0))
