"""What docs/muon.md says of keys, schedules and traffic is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from nemo_like.config.optimizer import NEWTON_SCHULZ_STEPS, OptimizerConfig
from nemo_like.optim.layout import layout_on
from nemo_like.optim.newton_schulz import coefficients
from nemo_like.optim.plan import make_plan
from nemo_like.optim.rule import scale_factor

PAGE = (Path(__file__).parents[2] / "docs/muon.md").read_text()


def rows_of(header: str) -> list[list[str]]:
    """The cells of the table with this header."""
    table = PAGE.split(header)[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def test_every_key_of_muon_has_a_row():
    told = {
        key
        for row in rows_of("| Key | What it does |")
        for key in re.findall(r"`(muon_\w+)`", row[0])
    }
    keys = {key for key in OptimizerConfig.model_fields if key.startswith("muon_")}
    assert told == keys | {"muon_nesterov"}


def test_every_key_of_muon_that_the_page_names_exists():
    named = set(re.findall(r"`(muon_\w+)", PAGE))
    assert named - {"muon_nesterov"} <= OptimizerConfig.model_fields.keys()


def test_singular_values_end_where_the_page_says():
    told = {row[0].split("`")[1]: row for row in rows_of("| `muon_coefficient_type` |")}
    assert told.keys() == NEWTON_SCHULZ_STEPS.keys()
    for name, (_, steps, ends, _) in told.items():
        allowed = NEWTON_SCHULZ_STEPS[name]
        if name == "custom":
            continue
        assert steps == str(allowed[0]) + (" or more" if len(allowed) > 1 else "")
        count = 5 if name == "simple" else allowed[0]
        values = torch.logspace(-2, 0, 20_001, dtype=torch.float64)
        for polynomial in coefficients(name, count):
            values = sum(c * values ** (2 * i + 1) for i, c in enumerate(polynomial))
        low, high = re.match(r"([\d.]+) to ([\d.]+)", ends).groups()
        for written, found in ((low, values.min()), (high, values.max())):
            decimals = len(written.partition(".")[2])
            assert written == f"{float(found):.{decimals}f}", name


@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 4096)])
def test_scales_are_those_of_the_page(shape):
    R, C = shape
    names = {"sqrt": lambda x: x**0.5, "max": max, "R": R, "C": C}
    for row in rows_of("| `muon_scale_mode` | scale(R, C) |"):
        formula = re.sub(r"([\d.]+) sqrt", r"\1 * sqrt", row[1])
        for mode in re.findall(r"`(\w+)`", row[0]):
            assert scale_factor(mode, R, C) == pytest.approx(eval(formula, names)), mode


MESHES = {
    "FSDP": ((8,), [Shard(0)], 8),
    "TP": ((8,), [Shard(1)], 8),
    "FSDP x TP": ((4, 2), [Shard(0), Shard(1)], 8),
    "HSDP": ((2, 4), [Replicate(), Shard(0)], 4),
    "FSDP of what TP does not cut": ((4, 2), [Shard(0), Replicate()], 4),
    "copies": ((4,), [Replicate()], 1),
}


@pytest.mark.parametrize("name", MESHES)
def test_ranks_send_what_the_formula_of_the_page_says(name):
    assert "bN/W (1 + r - 2/S)" in PAGE
    mesh_shape, placements, S = MESHES[name]
    W = torch.Size(mesh_shape).numel()
    r = W // S
    layout = layout_on((16, 32), torch.arange(W).view(mesh_shape), placements)
    plan = make_plan([layout] * 3)
    assert sum(plan.sent) == pytest.approx(3 * 16 * 32 / W * (1 + r - 2 / S))


def test_experts_send_what_the_formula_of_the_page_says():
    assert "2bN/G (1 - 1/G), N those of its experts" in PAGE
    layout = layout_on((4, 16, 32), torch.arange(8).view(2, 4), [Shard(0), Shard(1)])
    plan = make_plan([layout])
    assert sum(plan.sent) == pytest.approx(2 * (2 * 16 * 32) / 4 * (1 - 1 / 4))
