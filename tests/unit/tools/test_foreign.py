"""Training that began under another program's optimizer goes on under ours as if nothing was."""

from __future__ import annotations

import io

import pytest
import torch
from muon_by_hand import KellerJordan, Moonlight
from torch import nn

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.errors import CheckpointError
from nemo_like.optim.build import build_optimizer
from tools.foreign import read_foreign

FP64 = torch.float64
MATRICES = {"a.weight": (12, 20), "b.weight": (20, 12)}
REST = {"embed.weight": (10, 8), "norm.weight": (8,)}
SHAPES = REST | MATRICES
EXACT = {"muon_ns_dtype": "float64", "muon_coefficient_type": "simple", "muon_use_nesterov": True}
BEFORE, AFTER = range(3), range(3, 5)


def weights():
    g = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=g, dtype=FP64)) for n, s in SHAPES.items()}


def gradients(step):
    g = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(s, generator=g, dtype=FP64) for n, s in SHAPES.items()}


def train(parameters, optimizers, steps):
    for step in steps:
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient
        for optimizer in optimizers:
            optimizer.step()


def through_a_file(value):
    """What `torch.save` and a safe `torch.load` make of it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continued(parameters, states, **settings):
    """Ours on copies of these parameters, with the state in what others saved."""
    copies = {n: nn.Parameter(p.detach().clone()) for n, p in parameters.items()}
    config = OptimizerConfig(optimizer="muon", lr=0.02, weight_decay=0.1, **EXACT, **settings)
    optimizer, routing = build_optimizer(copies.items(), config)
    tree, owners = {"state": {}, "steps": {}}, {}
    for state, names in states:
        part, part_owners = read_foreign(through_a_file(state), SHAPES, names)
        tree["state"] |= part["state"]
        tree["steps"] |= part["steps"]
        owners |= part_owners
    assert owners == routing.owners()
    optimizer.load_state_tree(tree)
    return copies, optimizer


def assert_equal(found, expected, tolerance=1e-12):
    for name in SHAPES:
        torch.testing.assert_close(
            found[name].detach(), expected[name].detach(), rtol=0, atol=tolerance
        )


@pytest.fixture
def torch_in_fp64(monkeypatch):
    """`torch.optim.Muon` orthogonalises in bf16; here by hand, so that equality means something."""
    import torch.optim._muon as torch_muon
    from muon_by_hand import polar_by_hand

    monkeypatch.setattr(
        torch_muon,
        "_zeropower_via_newtonschulz",
        lambda gradient, *settings: polar_by_hand(gradient),
    )


@pytest.mark.parametrize("named", [True, False], ids=["with names", "by number"])
def test_training_goes_on_from_torchs_muon_and_adamw(torch_in_fp64, named):
    theirs = weights()

    def given(shapes):
        return [(n, theirs[n]) for n in shapes] if named else [theirs[n] for n in shapes]

    optimizers = (
        torch.optim.Muon(
            given(MATRICES), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(given(REST), lr=0.02, weight_decay=0.1),
    )
    train(theirs, optimizers, BEFORE)
    names = (None, None) if named else (list(MATRICES), list(REST))
    states = [(o.state_dict(), n) for o, n in zip(optimizers, names, strict=True)]
    ours, optimizer = continued(theirs, states, muon_scale_mode="match_rms_adamw")
    train(theirs, optimizers, AFTER)
    train(ours, [optimizer], AFTER)
    assert_equal(ours, theirs)


class ByHand:
    """Muon by hand beside torch's AdamW, with the dict that the real program would save."""

    def __init__(self, rule):
        self.weights = weights()
        self.muon = rule([self.weights[n].data for n in MATRICES], lr=0.02, decay=0.1)
        self.adamw = torch.optim.AdamW(
            [self.weights[n] for n in REST], lr=0.02, weight_decay=0.1, eps=1e-8
        )

    def step(self):
        self.muon.step([self.weights[n].grad for n in MATRICES])
        self.adamw.step()

    def saved(self, form):
        moments = [self.adamw.state[self.weights[n]] for n in REST]
        return form(self.muon.buffers, moments)


NAMES = [*MATRICES, *REST]
MUON_IDS, ADAMW_IDS = [0, 1], [2, 3]
AUX_MUON = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "use_muon": True}
AUX_ADAM = {"lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "use_muon": False}


def keller_jordan(buffers, moments):
    states = [{"momentum_buffer": b} for b in buffers]
    states += [{**m, "step": int(m["step"])} for m in moments]
    groups = [AUX_MUON | {"params": MUON_IDS}, AUX_ADAM | {"params": ADAMW_IDS}]
    return {"state": dict(enumerate(states)), "param_groups": groups}


def moonlight(buffers, moments):
    states = [{"use_muon": True, "momentum_buffer": b} for b in buffers]
    states += [
        {
            "use_muon": False,
            "step": int(m["step"]),
            "moment1": m["exp_avg"],
            "moment2": m["exp_avg_sq"],
        }
        for m in moments
    ]
    group = {
        "lr": 0.02, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5,
        "adamw_betas": (0.9, 0.999), "adamw_eps": 1e-8, "params": MUON_IDS + ADAMW_IDS,
    }  # fmt: skip
    return {"state": dict(enumerate(states)), "param_groups": [group]}


def dion(buffers, moments):
    states = [{"momentum": b} for b in buffers]
    states += [{"momentum": m["exp_avg"], "variance": m["exp_avg_sq"]} for m in moments]
    shared = {"lr": 0.02, "mu": 0.95, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "step": 3}
    groups = [
        shared | {"algorithm": "muon", "params": MUON_IDS},
        shared | {"algorithm": "adamw", "params": ADAMW_IDS},
    ]
    return {"state": dict(enumerate(states)), "param_groups": groups}


def late_dion(buffers, moments):
    saved = dion(buffers, moments)
    for group in saved["param_groups"]:
        group["step"] = 0  # a captured graph counts on the device
    for index, moment in zip(ADAMW_IDS, moments, strict=True):
        saved["state"][index]["step_dev"] = moment["step"]
    return saved


@pytest.mark.parametrize(
    ("rule", "scale", "form"),
    [
        (KellerJordan, "original", keller_jordan),
        (Moonlight, "match_rms_adamw", moonlight),
        (Moonlight, "match_rms_adamw", dion),
        (Moonlight, "match_rms_adamw", late_dion),
    ],
)
def test_training_goes_on_from_muon_of_others_averaged_or_accumulated(rule, scale, form):
    theirs = ByHand(rule)
    train(theirs.weights, [theirs], BEFORE)
    states = [(theirs.saved(form), NAMES)]
    ours, optimizer = continued(theirs.weights, states, muon_scale_mode=scale)
    train(theirs.weights, [theirs], AFTER)
    train(ours, [optimizer], AFTER)
    assert_equal(ours, theirs.weights)


def test_keller_jordans_plain_muon_is_told_from_sgd_by_its_settings():
    state = {0: {"momentum_buffer": torch.ones(12, 20)}}
    plain = {"lr": 0.02, "weight_decay": 0, "momentum": 0.95, "initial_lr": 0.02, "params": [0]}
    _, owners = read_foreign({"state": state, "param_groups": [plain]}, SHAPES, ["a.weight"])
    assert owners == {"a.weight": "muon"}
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(12, 20))], momentum=0.9).state_dict()
    with pytest.raises(CheckpointError, match="dampening"):
        read_foreign({**sgd, "state": state}, SHAPES, ["a.weight"])


def test_names_lose_what_wrappers_put_before_them_and_halves_become_fp32():
    group = AUX_MUON | {"params": [0], "param_names": ["module._orig_mod.a.weight"]}
    state = {0: {"momentum_buffer": torch.ones(12, 20, dtype=torch.bfloat16)}}
    tree, _ = read_foreign({"state": state, "param_groups": [group]}, SHAPES)
    assert tree["state"]["a.weight"]["momentum_buffer"].dtype == torch.float32


def buffer(*shape):
    return {0: {"momentum_buffer": torch.ones(shape or (12, 20))}}


REFUSED = {
    "no dict": ([1], None, "found list"),
    "a whole training state": ({"model": 1, "optimizer": 2}, None, "found model, optimizer"),
    "no names": ((buffer(), AUX_MUON), None, "numbers and no names for its 1 param"),
    "too few names": ((buffer(), AUX_MUON), [], "0 names were given for 1 param"),
    "foreign name": ((buffer(), AUX_MUON), ["c"], "c is no parameter of the model"),
    "other shape": ((buffer(3, 4), AUX_MUON), ["a.weight"], r"\(3, 4\), the parameter is \(12"),
    "no tensor": (({0: {"momentum_buffer": 1.0}}, AUX_MUON), ["a.weight"], "is float, the param"),
    "never stepped": (({}, AUX_MUON), ["a.weight"], "it has nothing, so it was never stepped"),
    "further state": (
        ({0: buffer()[0] | {"variance_neuron": 1}}, AUX_MUON), ["a.weight"],
        "it has momentum_buffer, variance_neuron, in a group with lr",
    ),
    "another algorithm": (
        ({0: {"momentum": torch.ones(12, 20)}}, {"mu": 0.9, "algorithm": "lion"}), ["a.weight"],
        "none that is understood",
    ),
    "not finite": (
        ({0: {"momentum_buffer": torch.full((12, 20), float("nan"))}}, AUX_MUON), ["a.weight"],
        "momentum_buffer of a.weight is not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_with_what_was_found(case):
    saved, names, message = REFUSED[case]
    if isinstance(saved, tuple):
        state, group = saved
        saved = {"state": state, "param_groups": [group | {"params": [0]}]}
    with pytest.raises(CheckpointError, match=message):
        read_foreign(saved, SHAPES, names)


def test_a_parameter_that_is_there_twice_is_refused():
    state = {0: buffer()[0], 1: buffer()[0]}
    saved = {"state": state, "param_groups": [AUX_MUON | {"params": [0, 1]}]}
    with pytest.raises(CheckpointError, match=r"a\.weight is there twice"):
        read_foreign(saved, SHAPES, ["a.weight", "a.weight"])
