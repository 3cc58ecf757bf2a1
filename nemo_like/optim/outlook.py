"""What to expect of Muon, before the first step: how long its steps are, and who computes what."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.optim.build import muon_rule
from nemo_like.optim.plan import Plan
from nemo_like.optim.routing import Owner, Routing


def outlook(config: OptimizerConfig, routing: Routing, plans: Sequence[Plan]) -> dict[str, str]:
    """Facts in words by title; none without Muon. `plans` are those of its matrices."""
    owned = [row for row in routing.rows if row.optimizer == "muon"]
    if not owned:
        return {}
    facts = {**_steps(config, owned), **_work(config, plans)}
    if config.muon_tp_mode == "blockwise":
        facts["muon_tp_mode=blockwise"] = (
            "each tensor-parallel rank orthogonalises its own block of a matrix: the update is not "
            "Muon's, and depends on tensor_model_parallel_size"
        )
    return facts


def step_sizes(config: OptimizerConfig, owned: Sequence[Owner]) -> dict[float, str]:
    """Root mean square of a Muon update in units of lr, with the first matrix that has it.

    Ascending. An orthogonal R x C matrix has min(R, C) singular values of one, so the root mean
    square of its entries is 1/sqrt(max(R, C)).
    """
    rule = muon_rule(config)
    sizes: dict[float, str] = {}
    for row in owned:
        for _, rows, columns in row.view.shapes(row.shape):
            size = rule.scale(rows, columns) / math.sqrt(max(rows, columns))
            sizes.setdefault(float(f"{size:.3g}"), f"{row.name}, {rows} x {columns}")
    return dict(sorted(sizes.items()))


def adamw_noise_size(beta1: float) -> float:
    """Root mean square of an AdamW update in units of lr, where gradients are white noise.

    Their moving average with weights (1 - b) b^k has the variance (1 - b)/(1 + b) of one of them.
    Where gradients are steady the update is lr.
    """
    return math.sqrt((1 - beta1) / (1 + beta1))


def _steps(config: OptimizerConfig, owned: Sequence[Owner]) -> dict[str, str]:
    lr, sizes, noise = config.lr, step_sizes(config, owned), adamw_noise_size(config.adam_beta1)
    low, high = min(sizes), max(sizes)
    ends = [f"{size:.2g} lr = {size * lr:.2g}" for size in (low, high)]
    if low == high:
        muon = f"{ends[0]}, of every matrix"
    else:
        muon = f"{ends[0]} ({sizes[low]}) to {ends[1]} ({sizes[high]})"
    return {
        "Muon moves an entry by": f"about {muon} (root mean square)",
        "AdamW moves an entry by": f"about {noise:.2g} lr = {noise * lr:.2g} where gradients are "
        f"noise, up to lr = {lr:.2g} where they are steady",
        "Muon's step to AdamW's": f"{_span(low / noise, high / noise)} times as long in noise, "
        f"{_span(low, high)} times at steady gradients, at any learning rate (the highest is "
        f"{lr:g})",
    }


def _work(config: OptimizerConfig, plans: Sequence[Plan]) -> dict[str, str]:
    """Who orthogonalises how much, and what the rank that sends most sends for it."""
    matrices = Counter(owner for plan in plans for owner in plan.owners)
    gflop: dict[int, float] = {}
    for plan in plans:
        for rank, flops in plan.loads.items():
            gflop[rank] = gflop.get(rank, 0.0) + flops / 1e9
    mean, each = sum(gflop.values()) / len(gflop), [matrices[rank] for rank in gflop]
    facts = {"Newton-Schulz in a step": f"{sum(each):,} matrices, {mean:,.2f} GFLOP of a rank"}
    if len(gflop) > 1:
        facts["owners"] = (
            f"{len(gflop)} ranks with {_span(min(each), max(each))} matrices each; the busiest has "
            f"{max(gflop.values()) / mean:.2f} times the mean work"
        )
    itemsize = muon_rule(config).wire(torch.float32).itemsize
    sent_by: dict[int, list[float]] = {}
    for plan in plans:
        for rank in plan.ranks:
            sent_by.setdefault(rank, []).extend(n * itemsize / 1e6 for n in plan.sent)
    if sent := max(sent_by.values(), key=sum):
        facts["sent in a step"] = (
            f"{sum(sent):,.3g} MB by a rank, in {len(sent)} bucket(s) of "
            f"{_span(min(sent), max(sent))} MB"
        )
    return facts


def _span(low: float, high: float) -> str:
    texts = (f"{x:,.0f}" if x >= 100 else f"{x:.2g}" for x in (low, high))
    return " to ".join(dict.fromkeys(texts))
