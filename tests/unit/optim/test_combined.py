from __future__ import annotations

import copy
import weakref

import pytest
import torch
from muon_by_hand import KellerJordan, Moonlight
from torch import nn

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.errors import CheckpointError, ConfigError
from nemo_like.optim.build import build_optimizer
from nemo_like.optim.views import AttentionShape

FP64 = torch.float64
SHAPES = {"a": (12, 20), "b": (20, 12), "c": (12, 20), "d": (9, 9)}
EXACT = {"muon_ns_dtype": "float64", "muon_coefficient_type": "simple"}


def weights(shapes=SHAPES, dtype=FP64, seed=0) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, dtype=dtype, generator=g)) for n, s in shapes.items()}


def gradients(parameters, step: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, dtype=p.dtype, generator=g) for p in parameters]


def train(optimizer, parameters, steps=range(5)) -> None:
    for step in steps:
        for p, gradient in zip(parameters, gradients(parameters, step), strict=True):
            p.grad = gradient
        optimizer.step()


def build(parameters: dict[str, nn.Parameter], **settings):
    return build_optimizer(parameters.items(), OptimizerConfig(**settings))[0]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("mode", "extra", "twin"),
    [
        ("original", None, KellerJordan),
        ("spectral", None, Moonlight),
        ("match_rms_adamw", None, Moonlight),
    ],
)
def test_muon_is_the_rule_its_authors_wrote_down(mode, extra, twin, nesterov):
    ours, theirs = weights(), weights()
    settings = {"lr": 0.02, "weight_decay": 0.1, "muon_use_nesterov": nesterov, **EXACT}
    train(build(ours, optimizer="muon", muon_scale_mode=mode, **settings), list(ours.values()))
    reference = twin([p.data for p in theirs.values()], lr=0.02, nesterov=nesterov, decay=0.1)
    for step in range(5):
        reference.step(gradients(list(theirs.values()), step))
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mode", ["original", "match_rms_adamw"])
def test_muon_is_that_of_torch_once_both_orthogonalise_in_fp64(mode, nesterov, monkeypatch):
    import torch.optim._muon as torch_muon

    def in_fp64(gradient, coefficients, steps, eps):
        wide = gradient.T if gradient.size(0) > gradient.size(1) else gradient
        a, b, c = coefficients
        X = wide / wide.norm()
        for _ in range(steps):
            gram = X @ X.T
            X = a * X + (b * gram + c * gram @ gram) @ X
        return X.T if gradient.size(0) > gradient.size(1) else X

    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", in_fp64)
    ours, theirs = weights(), weights()
    settings = {"lr": 0.02, "weight_decay": 0.1, "muon_use_nesterov": nesterov, **EXACT}
    train(build(ours, optimizer="muon", muon_scale_mode=mode, **settings), list(ours.values()))
    theirs_list = list(theirs.values())
    reference = torch.optim.Muon(
        theirs_list, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=mode
    )
    train(reference, theirs_list)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)


def test_muon_in_bf16_stays_as_close_to_torch_as_bf16_allows():
    ours, theirs = weights(dtype=torch.float32), weights(dtype=torch.float32)
    start = weights(dtype=torch.float32)
    settings = {"lr": 0.02, "weight_decay": 0.0, "muon_coefficient_type": "simple"}
    train(
        build(ours, optimizer="muon", muon_scale_mode="original", **settings), list(ours.values())
    )
    reference = torch.optim.Muon(theirs.values(), lr=0.02, weight_decay=0.0, nesterov=False)
    train(reference, list(theirs.values()))
    for name in SHAPES:
        moved = (theirs[name] - start[name]).norm()
        assert (ours[name] - theirs[name]).norm() / moved < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, FP64])
def test_adamw_is_that_of_torch_bit_for_bit(dtype):
    shapes = SHAPES | {"bias": (20,)}
    ours, theirs = weights(shapes, dtype), weights(shapes, dtype)
    train(build(ours, optimizer="adam", lr=0.01, weight_decay=0.1), list(ours.values()))
    reference = torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.1, fused=True)
    train(reference, list(theirs.values()))
    assert all(torch.equal(ours[name], theirs[name]) for name in shapes)


def test_sgd_is_that_of_torch_with_its_decay_decoupled():
    ours, theirs = weights(), weights()
    train(build(ours, optimizer="sgd", lr=0.01, weight_decay=0.0), list(ours.values()))
    train(torch.optim.SGD(theirs.values(), lr=0.01, momentum=0.9), list(theirs.values()))
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-14)
    decayed = weights()
    optimizer = build(decayed, optimizer="sgd", lr=0.01, weight_decay=0.5)
    for p in decayed.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(decayed["a"], weights()["a"] * (1 - 0.01 * 0.5), rtol=0, atol=1e-15)


MIXED = {"embed.weight": (10, 8), "a.weight": (12, 8), "norm": (8,), "experts": (3, 6, 8)}


def test_both_halves_run_in_one_step_and_gradients_are_only_read():
    parameters = weights(MIXED, torch.float32)
    before = copy.deepcopy(parameters)
    optimizer = build(parameters, optimizer="muon", lr=0.01, muon_use_nesterov=True)
    train(optimizer, list(parameters.values()), range(1))
    for p, gradient in zip(parameters.values(), gradients(parameters.values(), 0), strict=True):
        assert torch.equal(p.grad, gradient)
    assert all(not torch.equal(parameters[name], before[name]) for name in MIXED)
    assert [group["algorithm"] for group in optimizer.param_groups] == ["adamw", "muon"]


def test_each_expert_of_a_stack_is_a_matrix_of_its_own():
    stack = weights({"experts": (3, 6, 8)})
    alone = {f"w{i}": nn.Parameter(stack["experts"][i].detach().clone()) for i in range(3)}
    together, single = (build(p, optimizer="muon", lr=0.1, **EXACT) for p in (stack, alone))
    gradient = torch.randn(3, 6, 8, dtype=FP64)
    stack["experts"].grad = gradient
    for i, p in enumerate(alone.values()):
        p.grad = gradient[i].clone()
    together.step()
    single.step()
    torch.testing.assert_close(
        stack["experts"], torch.stack(list(alone.values())), atol=1e-14, rtol=0
    )


def test_state_exists_in_fp32_before_the_first_step():
    optimizer = build(weights(MIXED, torch.float32), optimizer="muon")
    tree = optimizer.state_tree()
    assert tree["state"].keys() == MIXED.keys()
    assert tree["state"]["a.weight"].keys() == {"momentum_buffer"}
    assert tree["state"]["norm"].keys() == {"exp_avg", "exp_avg_sq"}
    assert tree["steps"] == {"embed.weight": 0, "norm": 0}
    every = [t for tensors in tree["state"].values() for t in tensors.values()]
    assert all(t.dtype == torch.float32 and not t.any() for t in every)


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_a_restored_optimizer_continues_bit_for_bit(name):
    straight = weights(MIXED, torch.float32)
    optimizer = build(straight, optimizer=name, lr=0.01)
    train(optimizer, list(straight.values()), range(3))
    saved = copy.deepcopy(optimizer.state_tree())
    resumed = copy.deepcopy(straight)
    for p in resumed.values():
        p.grad = None
    train(optimizer, list(straight.values()), range(3, 6))
    again = build(resumed, optimizer=name, lr=0.01)
    again.load_state_tree(saved)
    train(again, list(resumed.values()), range(3, 6))
    assert all(torch.equal(straight[n], resumed[n]) for n in MIXED)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"extra.weight": (4, 4)} | MIXED, "extra.weight is unknown here"),
        ({n: s for n, s in MIXED.items() if n != "norm"}, "norm is missing"),
        (MIXED | {"a.weight": (8, 8)}, "a.weight has another shape"),
    ],
)
def test_a_state_of_another_model_is_refused_by_name(other, message):
    tree = build(weights(other, torch.float32), optimizer="muon").state_tree()
    optimizer = build(weights(MIXED, torch.float32), optimizer="muon")
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_tree(tree)


def test_a_state_of_another_algorithm_is_refused():
    tree = build(weights(MIXED, torch.float32), optimizer="adam").state_tree()
    optimizer = build(weights(MIXED, torch.float32), optimizer="muon")
    with pytest.raises(
        CheckpointError, match="a.weight has exp_avg, exp_avg_sq, expected momentum"
    ):
        optimizer.load_state_tree(tree)


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_a_parameter_without_gradient_is_left_alone(name):
    parameters = weights(MIXED, torch.float32)
    optimizer = build(parameters, optimizer=name, lr=0.01, weight_decay=0.1)
    train(optimizer, list(parameters.values()), range(2))
    frozen = {n: parameters[n].detach().clone() for n in ("a.weight", "norm")}
    state = copy.deepcopy(optimizer.state_tree())
    for p, gradient in zip(parameters.values(), gradients(parameters.values(), 2), strict=True):
        p.grad = gradient
    for name in frozen:
        parameters[name].grad = None
    optimizer.step()
    after = optimizer.state_tree()
    for name, value in frozen.items():
        assert torch.equal(parameters[name], value)
        assert all(torch.equal(after["state"][name][k], t) for k, t in state["state"][name].items())
        assert after["steps"].get(name) == state["steps"].get(name)


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_zero_gradient_moves_nothing(nesterov):
    parameters = weights({"a": (8, 8), "b": (8, 8)})
    settings = {"lr": 0.1, "weight_decay": 0.1, "muon_use_nesterov": nesterov}
    optimizer = build(parameters, optimizer="muon", **settings, **EXACT)
    train(optimizer, list(parameters.values()), range(2))
    before = copy.deepcopy([parameters, optimizer.state_tree()["state"]])
    for p, gradient in zip(parameters.values(), gradients(parameters.values(), 2), strict=True):
        p.grad = gradient
    parameters["b"].grad = torch.zeros(8, 8, dtype=FP64)
    optimizer.step()
    after = [parameters, optimizer.state_tree()["state"]]
    assert torch.equal(after[0]["b"], before[0]["b"])
    assert torch.equal(after[1]["b"]["momentum_buffer"], before[1]["b"]["momentum_buffer"])
    assert not torch.equal(after[0]["a"], before[0]["a"])


def test_a_gradient_of_the_smallest_number_moves_a_whole_step():
    parameters = weights({"a": (8, 8)}, torch.float32)
    before = parameters["a"].detach().clone()
    parameters["a"].grad = torch.eye(8) * torch.finfo(torch.float32).tiny
    settings = {"lr": 1.0, "weight_decay": 0.0, "muon_momentum": 0.0}
    build(parameters, optimizer="muon", muon_ns_dtype="float64", **settings).step()
    moved = before - parameters["a"].detach()
    torch.testing.assert_close(moved, torch.eye(8) * 0.2 * 8**0.5, rtol=0.04, atol=1e-6)


@pytest.mark.parametrize("lr", [1e-6, 5e-6])
def test_weight_decay_arrives_at_the_learning_rates_of_reinforcement_learning(lr):
    shape = {"a": (128, 128)}
    decayed, plain = weights(shape, torch.float32), weights(shape, torch.float32)
    start = decayed["a"].detach().double()
    for parameters, decay in ((decayed, 0.01), (plain, 0.0)):
        train(build(parameters, optimizer="muon", lr=lr, weight_decay=decay),
              list(parameters.values()), range(200))  # fmt: skip
    found = ((plain["a"].double() - decayed["a"].double()) * start).sum() / start.square().sum()
    assert float(found) == pytest.approx(200 * lr * 0.01, rel=0.02)


def test_gradients_are_free_once_they_are_dropped():
    parameters = weights({"a": (8, 8)})
    optimizer = build(parameters, optimizer="muon", **EXACT)
    optimizer.watch = True
    train(optimizer, list(parameters.values()), range(1))
    gradient = weakref.ref(parameters["a"].grad)
    optimizer.zero_grad()
    assert gradient() is None and optimizer.metrics()


def test_metrics_of_a_step_without_any_signal_are_zero():
    parameters = weights({"a": (8, 8), "b": (8, 8)}, torch.float32)
    optimizer = build(parameters, optimizer="muon", **EXACT)
    optimizer.watch = True
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert set(optimizer.metrics().values()) == {0.0}


def test_matrices_computed_together_get_the_updates_of_each_alone():
    shapes = {"a": (8, 12), "b": (8, 12), "experts": (3, 12, 8), "c": (4, 4)}
    one_by_one, together = weights(shapes), weights(shapes)
    for parameters, batch in ((one_by_one, 1), (together, 10**6)):
        optimizer = build(parameters, optimizer="muon", lr=0.1, **EXACT)
        for muon in optimizer.muons:
            muon._batch = batch
        train(optimizer, list(parameters.values()), range(2))
    for name in shapes:
        torch.testing.assert_close(one_by_one[name], together[name], rtol=0, atol=1e-14)


def test_torch_s_form_of_the_state_is_refused_with_the_one_to_take():
    optimizer = build(weights(), optimizer="muon")
    for refused in (optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(NotImplementedError, match="take state_tree"):
            refused()


def test_weights_of_two_types_are_refused():
    mixed = weights({"a": (8, 8)}) | weights({"b": (8, 8)}, torch.float32)
    with pytest.raises(ConfigError, match="of one type"):
        build(mixed, optimizer="muon")


def test_with_always_a_zero_gradient_lets_momentum_go_on():
    ours, theirs = weights({"a": (8, 8)}), weights({"a": (8, 8)})
    settings = {"lr": 0.02, "weight_decay": 0.1, "muon_use_nesterov": True, **EXACT}
    optimizer = build(ours, optimizer="muon", muon_zero_grad="always", **settings)
    reference = Moonlight([theirs["a"].data], lr=0.02, nesterov=True, decay=0.1)
    for gradient in (*gradients(ours.values(), 0), torch.zeros(8, 8, dtype=FP64)):
        ours["a"].grad = gradient
        optimizer.step()
        reference.step([gradient])
    torch.testing.assert_close(ours["a"], theirs["a"], rtol=0, atol=1e-12)


def test_the_parts_of_a_packed_matrix_move_or_stay_one_by_one():
    rows = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
    packed = weights({"qkv_proj.weight": (16, 8)})
    apart = {
        f"{n}.weight": nn.Parameter(part.detach().clone())
        for n, part in zip(rows, packed["qkv_proj.weight"].split(list(rows.values())), strict=True)
    }
    attention = AttentionShape(num_heads=2, num_kv_heads=1, head_dim=4, family="phi3")
    config = OptimizerConfig(optimizer="muon", lr=0.1, weight_decay=0.1, **EXACT)
    together = build_optimizer(packed.items(), config, attention=attention)[0]
    single = build_optimizer(apart.items(), config, attention=attention)[0]
    for step in range(4):
        (gradient,) = gradients(packed.values(), step)
        gradient[8 : 8 + 2 * step] = 0  # nothing, a part of k, k, k and a part of v
        packed["qkv_proj.weight"].grad = gradient
        for p, part in zip(apart.values(), gradient.split(list(rows.values())), strict=True):
            p.grad = part.clone()
        together.step()
        single.step()
    torch.testing.assert_close(
        packed["qkv_proj.weight"], torch.cat(list(apart.values())), rtol=0, atol=1e-14
    )


def test_metrics_tell_the_size_of_the_update_of_each_half():
    parameters = weights(MIXED)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = build(parameters, optimizer="muon", lr=0.01, weight_decay=0.0, **EXACT)
    assert optimizer.metrics() == {}
    optimizer.watch = True
    train(optimizer, list(parameters.values()), range(1))
    metrics = optimizer.metrics()
    for half, names in (("muon", ("a.weight", "experts")), ("adamw", ("embed.weight", "norm"))):
        change = torch.cat([(parameters[n].detach() - before[n]).flatten() for n in names]).norm()
        weight = torch.cat([parameters[n].detach().flatten() for n in names]).norm()
        count = sum(parameters[n].numel() for n in names)
        assert metrics[f"{half}/update_rms"] == pytest.approx(float(change) / count**0.5)
        assert metrics[f"{half}/update_to_weight"] == pytest.approx(float(change / weight))


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_metrics_count_what_was_stepped_with_the_rate_it_was_stepped_with(name):
    parameters = weights({"a": (8, 8), "b": (8, 8)})
    optimizer = build(parameters, optimizer=name, lr=0.01, weight_decay=0.0, **EXACT)
    train(optimizer, list(parameters.values()), range(3))
    before = parameters["a"].detach().clone()
    parameters["b"].grad = None
    optimizer.watch = True
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 7.0
    (half,) = {key.split("/")[0] for key in optimizer.metrics()}
    expected = float((parameters["a"] - before).norm()) / 8
    assert optimizer.metrics()[f"{half}/update_rms"] == pytest.approx(expected)


def test_weights_in_half_precision_are_refused():
    with pytest.raises(ConfigError, match=r"a is held in torch.bfloat16, expected fp32 master"):
        build(weights(dtype=torch.bfloat16), optimizer="adam")


def test_heads_to_split_where_there_are_none_are_refused():
    with pytest.raises(ConfigError, match="found no matrix with heads"):
        build(weights(), optimizer="muon", muon_split_heads=True)


def test_a_tied_parameter_is_stepped_once():
    shared = nn.Parameter(torch.ones(4, 4))
    named = [("embed.weight", shared), ("lm_head.weight", shared)]
    optimizer, routing = build_optimizer(named, OptimizerConfig(optimizer="muon"))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    assert routing.names("adamw") == ("embed.weight",)


def test_a_closure_is_called_with_gradients_on():
    p = {"w": nn.Parameter(torch.ones(3, 3))}
    optimizer = build(p, optimizer="adam", lr=0.1)

    def loss():
        optimizer.zero_grad()
        value = p["w"].square().sum()
        value.backward()
        return value

    assert float(optimizer.step(loss)) == 9.0
    assert float(p["w"].square().sum()) < 9.0
