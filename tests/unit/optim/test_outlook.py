import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.optim.build import build_optimizer, muon_rule
from nemo_like.optim.layout import layout_on
from nemo_like.optim.outlook import adamw_noise_size, outlook, step_sizes

SHAPES = {"layers.0.up": (96, 32), "layers.0.down": (32, 96), "layers.1.up": (96, 32)}
MODES = ["spectral", "match_rms_adamw", "unit_rms_norm", "shape_scaling"]


def muon(**settings):
    return OptimizerConfig(optimizer="muon", lr=0.01, **settings)


def build(config):
    named = {n: nn.Parameter(torch.zeros(s)) for n, s in SHAPES.items()}
    return named, *build_optimizer(named.items(), config)


@pytest.mark.parametrize("mode", MODES)
def test_muon_moves_entries_by_what_was_announced(mode):
    config = muon(muon_scale_mode=mode, muon_ns_dtype="float32", weight_decay=0.0)
    named, optimizer, routing = build(config)
    g = torch.Generator().manual_seed(0)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=g)
    optimizer.step()
    announced = {n: size for size, n in step_sizes(config, routing.rows).items()}
    assert len(announced) == (1 if mode in ("spectral", "match_rms_adamw") else 2)
    for where, size in announced.items():
        moved = named[where.split(",")[0]].detach().square().mean().sqrt()
        assert float(moved) == pytest.approx(config.lr * size, rel=0.03)


def test_adamw_moves_entries_by_what_was_announced_where_gradients_are_noise():
    weight = nn.Parameter(torch.zeros(10_000))
    config = OptimizerConfig(lr=0.01, adam_beta1=0.8, weight_decay=0.0)
    optimizer, _ = build_optimizer([("w", weight)], config)
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        before = weight.detach().clone()
        weight.grad = torch.randn(10_000, generator=g)
        optimizer.step()
    moved = float((weight.detach() - before).square().mean().sqrt())
    assert moved == pytest.approx(config.lr * adamw_noise_size(0.8), rel=0.03)


def test_an_outlook_compares_steps_and_names_the_matrices_at_both_ends():
    config = muon(muon_scale_mode="unit_rms_norm", adam_beta1=0.6)
    _, optimizer, routing = build(config)
    told = outlook(config, routing, [m.plan for m in optimizer.muons])
    moves = told["Muon moves an entry by"]
    assert "0.059 lr = 0.00059 (layers.0.down, 32 x 96)" in moves
    assert "0.18 lr = 0.0018 (layers.0.up, 96 x 32)" in moves
    assert told["Muon's step to AdamW's"].startswith(
        "0.12 to 0.35 times as long in noise, 0.059 to 0.18 times at steady gradients"
    )
    assert "owners" not in told and "sent in a step" not in told


def test_an_outlook_says_who_works_and_what_is_sent():
    config = muon(muon_bucket_mb=1e-3)
    _, _, routing = build(config)
    layouts = [layout_on(shape, torch.arange(2), [Shard(0)]) for shape in SHAPES.values()]
    plan = muon_rule(config).plan(layouts, [r.view for r in routing.rows], torch.float32)
    told = outlook(config, routing, [plan])
    # Five steps of 2 x 32^2 x (2 x 96 + 32) FLOPs for each of three matrices, over two ranks.
    assert told["Newton-Schulz in a step"] == "3 matrices, 0.00 GFLOP of a rank"
    assert (
        told["owners"] == "2 ranks with 1 to 2 matrices each; the busiest has 1.33 times the "
        "mean work"
    )
    # Half of each matrix travels, both ways, in bf16: 4 x 3072 bytes in all by both ranks.
    assert told["sent in a step"] == "0.00922 MB by a rank, in 2 bucket(s) of 0.0031 to 0.0061 MB"


def test_without_muon_there_is_no_outlook():
    config = OptimizerConfig()
    _, _, routing = build(config)
    assert outlook(config, routing, []) == {}
