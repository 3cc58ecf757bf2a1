"""What a new optimizer keeps of what the old one saw."""

from __future__ import annotations

import copy

import pytest
import torch
from muon_by_hand import KellerJordan
from torch import nn

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.errors import CheckpointError
from nemo_like.optim.build import build_optimizer
from nemo_like.optim.convert import convert, describe, template_for

FP64 = torch.float64
SHAPES = {"embed.weight": (10, 8), "a.weight": (12, 8), "b.weight": (8, 12), "norm.weight": (8,)}
EXACT = {"muon_ns_dtype": "float64", "muon_coefficient_type": "simple", "weight_decay": 0.0}
MUON = {"optimizer": "muon", "muon_scale_mode": "original", **EXACT}


def gradients(step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=g, dtype=FP64) for name, shape in SHAPES.items()}


class Run:
    """Parameters under an optimizer."""

    def __init__(self, weights=None, **settings):
        ones = {name: torch.ones(shape, dtype=FP64) for name, shape in SHAPES.items()}
        self.weights = {n: nn.Parameter(w.clone()) for n, w in (weights or ones).items()}
        config = OptimizerConfig(**({"lr": 0.01} | settings))
        self.optimizer, routing = build_optimizer(self.weights.items(), config)
        self.owners = routing.owners()

    def train(self, steps=range(3)) -> Run:
        for step in steps:
            for name, gradient in gradients(step).items():
                self.weights[name].grad = gradient
            self.optimizer.step()
        return self

    def tree(self):
        return copy.deepcopy(self.optimizer.state_tree())

    def continued(self, **settings) -> Run:
        """The run that goes on from this one's checkpoint with other settings."""
        after = Run({n: w.detach() for n, w in self.weights.items()}, **settings)
        own = after.optimizer.state_tree()
        template, saved = template_for(own, self.owners, after.owners), self.tree()
        assert shapes_of(template) == shapes_of(saved), "the template is the checkpoint's own form"
        for name, tensors in template["state"].items():  # as a checkpoint is loaded: in place
            for key, tensor in tensors.items():
                tensor.copy_(saved["state"][name][key])
        loaded = {"state": template["state"], "steps": saved["steps"]}
        after.optimizer.load_state_tree(convert(loaded, own, self.owners, after.owners))
        return after


def shapes_of(tree):
    tensors = {n: {k: t.shape for k, t in mine.items()} for n, mine in tree["state"].items()}
    return tensors, tree["steps"].keys()


def test_muon_goes_on_with_the_average_that_adamw_kept():
    adam = Run(optimizer="adam", adam_beta1=0.95).train()
    after = adam.continued(**MUON, muon_momentum=0.95)
    for name in ("a.weight", "b.weight"):
        average = torch.zeros(SHAPES[name], dtype=FP64)
        for step in range(3):
            average = 0.95 * average + 0.05 * gradients(step)[name]
        (found,) = after.tree()["state"][name].values()
        torch.testing.assert_close(found, average, rtol=0, atol=1e-15)


def test_the_first_step_of_muon_after_adamw_is_that_of_muon_by_hand():
    adam = Run(optimizer="adam", adam_beta1=0.95).train()
    names = ("a.weight", "b.weight")
    by_hand = KellerJordan(
        [adam.weights[n].detach().clone() for n in names], lr=0.01, nesterov=False
    )
    for step in range(3):  # Muon from the beginning, but with the weights of AdamW's end
        for name, buffer in zip(names, by_hand.buffers, strict=True):
            by_hand.direction(buffer, gradients(step)[name])
    after = adam.continued(**MUON).train(range(3, 5))
    for step in (3, 4):
        by_hand.step([gradients(step)[name] for name in names])
    for name, weight in zip(names, by_hand.weights, strict=True):
        torch.testing.assert_close(after.weights[name].detach(), weight, rtol=0, atol=1e-12)


def test_parameters_that_stay_with_their_optimizer_go_on_bit_for_bit():
    adam = {"optimizer": "adam", "weight_decay": 0.0}
    straight = Run(**adam).train(range(5))
    changed = Run(**adam).train().continued(**MUON).train(range(3, 5))
    for name in ("embed.weight", "norm.weight"):
        assert changed.owners[name] == "adamw"
        assert torch.equal(changed.weights[name], straight.weights[name])
    assert not torch.equal(changed.weights["a.weight"], straight.weights["a.weight"])


def test_adamw_begins_anew_where_muon_was():
    muon = Run(**MUON).train()
    after = muon.continued(optimizer="adam", weight_decay=0.0).train(range(3, 6))
    fresh = Run(
        {n: w.detach() for n, w in muon.weights.items()}, optimizer="adam", weight_decay=0.0
    ).train(range(3, 6))
    for name in ("a.weight", "b.weight"):
        assert torch.equal(after.weights[name], fresh.weights[name])
    assert after.tree()["steps"] == {
        "embed.weight": 6, "norm.weight": 6, "a.weight": 3, "b.weight": 3
    }  # fmt: skip


def test_another_routing_moves_only_what_it_names():
    muon = Run(**MUON).train()
    before = muon.tree()["state"]
    narrower = muon.continued(**MUON, muon_exclude=("b",))
    after = narrower.tree()
    assert torch.equal(
        after["state"]["a.weight"]["momentum_buffer"], before["a.weight"]["momentum_buffer"]
    )
    assert not any(t.any() for t in after["state"]["b.weight"].values())
    assert after["steps"] == {"embed.weight": 3, "norm.weight": 3, "b.weight": 0}
    back = narrower.train(range(3, 5)).continued(**MUON).tree()["state"]
    expected = narrower.tree()["state"]["b.weight"]["exp_avg"]
    assert torch.equal(back["b.weight"]["momentum_buffer"], expected)


@pytest.mark.parametrize(("old", "new"), [("sgd", "adam"), ("adam", "sgd"), ("sgd", "muon")])
def test_the_sum_of_sgd_is_nobodys_average(old, new):
    after = Run(optimizer=old).train().continued(optimizer=new)
    assert not any(t.any() for tensors in after.tree()["state"].values() for t in tensors.values())
    assert set(after.tree()["steps"].values()) <= {0}


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_a_conversion_that_is_not_needed_changes_nothing(name):
    run = Run(optimizer=name).train()
    after = run.continued(optimizer=name)
    assert str(after.tree()) == str(run.tree())
    assert describe(run.owners, after.owners) == []
    assert torch.equal(after.train().weights["a.weight"], run.train().weights["a.weight"])


def test_what_is_kept_and_what_starts_anew_is_told():
    adam, muon = Run(optimizer="adam").owners, Run(**MUON).owners
    assert describe(adam, muon) == [
        ("adamw", "embed.weight", "2", "all", "nothing"),
        ("adamw to muon", "a.weight", "2", "exp_avg as momentum_buffer", "nothing"),
    ]
    assert describe(muon, adam)[1][3:] == ("nothing", "exp_avg, exp_avg_sq, step")


def test_a_state_of_other_parameters_is_refused_by_name():
    owners = Run(optimizer="adam").owners
    own = Run(optimizer="adam").optimizer.state_tree()
    less = {name: owner for name, owner in owners.items() if name != "a.weight"}
    with pytest.raises(CheckpointError, match=r"a\.weight is only in"):
        template_for(own, less, owners)
