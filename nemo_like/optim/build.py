"""From the configuration to the optimizer, and to the table of what it owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.errors import ConfigError
from nemo_like.optim.combined import CombinedOptimizer
from nemo_like.optim.layout import Layout, layout_of
from nemo_like.optim.newton_schulz import coefficients
from nemo_like.optim.routing import Algorithm, Routing, route
from nemo_like.optim.rule import MuonRule, default_extra_factor
from nemo_like.optim.views import AttentionShape, view_of

ALGORITHMS: dict[str, Algorithm] = {
    "adam": "adamw",
    "sgd": "sgd",
    "muon": "muon",
    "dist_muon": "muon",
}


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: OptimizerConfig,
    *,
    embeddings: Iterable[str] = (),
    attention: AttentionShape | None = None,
    layout: Callable[[Tensor], Layout] = layout_of,
) -> tuple[CombinedOptimizer, Routing]:
    """The optimizer of all trainable parameters, and who owns each of them and why.

    `embeddings` names parameters that are known to be embeddings or output heads (see
    `routing.embedding_names`); well-known names are recognised without. `attention` says where in a
    packed matrix q, k and v are. `layout` says who holds which block of a parameter, if the program
    has several ranks: all who hold a copy of one are in it.

    Raises:
        ConfigError: a parameter or a setting does not allow it; the message names the key.
    """
    named = list(named_parameters)
    algorithm = ALGORITHMS[config.optimizer]
    routing = plan_routing(named, config, embeddings=embeddings, attention=attention, layout=layout)
    by_name = dict(named)
    # In one order on all ranks, with an empty group for what only others hold.
    algorithms: list[Algorithm] = ["adamw", "muon"] if algorithm == "muon" else [algorithm]
    groups = [
        {
            "params": [(name, by_name[name]) for name in routing.names(owner)],
            "algorithm": owner,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            **_settings(owner, config, routing),
        }
        for owner in algorithms
    ]
    optimizer = CombinedOptimizer(groups, layout)
    _prove_all_claimed(optimizer, named)
    return optimizer, routing


def plan_routing(
    named: Iterable[tuple[str, Tensor]],
    config: OptimizerConfig,
    *,
    embeddings: Iterable[str] = (),
    attention: AttentionShape | None = None,
    layout: Callable[[Tensor], Layout] = layout_of,
) -> Routing:
    """Who owns each parameter and why, and into which matrices Muon cuts it; see above.

    Raises:
        ConfigError: a parameter or a setting does not allow it; the message names the key.
    """
    routing = route(
        named,
        ALGORITHMS[config.optimizer],
        embeddings=embeddings,
        include=config.muon_include,
        exclude=config.muon_exclude,
        view=partial(
            view_of,
            attention=attention,
            split_qkv=config.muon_split_qkv,
            split_gate_up=config.muon_split_gate_up,
            split_heads=config.muon_split_heads,
        ),
        layout=layout,
    )
    if config.muon_split_heads and config.is_muon and not any(r.view.heads for r in routing.rows):
        raise ConfigError(
            "muon_split_heads=true found no matrix with heads among its own: it knows q_proj, "
            "k_proj, v_proj and packed forms of them; set it to false"
        )
    return routing


def muon_rule(config: OptimizerConfig) -> MuonRule:
    """Muon's update rule as configured, with open settings decided."""
    extra = config.muon_extra_scale_factor
    if config.muon_ns_dtype is not None:
        dtype = getattr(torch, config.muon_ns_dtype)
    else:
        dtype = torch.bfloat16 if config.muon_fp32_matmul_prec == "medium" else torch.float32
    return MuonRule(
        momentum=config.muon_momentum,
        nesterov=config.muon_use_nesterov,
        scale_mode=config.muon_scale_mode,
        extra_scale_factor=default_extra_factor(config.muon_scale_mode) if extra is None else extra,
        polynomials=coefficients(
            config.muon_coefficient_type,
            config.muon_num_ns_steps,
            custom=config.muon_ns_coefficients,
            promotion=config.muon_promotion_steps,
        ),
        ns_dtype=dtype,
        wire_dtype=config.muon_wire_dtype and getattr(torch, config.muon_wire_dtype),
        bucket_bytes=config.muon_bucket_mb * 1e6,
        zero_grad=config.muon_zero_grad,
    )


def _settings(owner: Algorithm, config: OptimizerConfig, routing: Routing) -> dict[str, Any]:
    match owner:
        case "muon":
            return {
                "rule": muon_rule(config),
                "views": [row.view for row in routing.rows if row.optimizer == "muon"],
                "clip": config.muon_clip == "all",
            }
        case "adamw":
            return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
        case "sgd":
            return {"momentum": config.sgd_momentum}


def _prove_all_claimed(optimizer: CombinedOptimizer, named: list[tuple[str, Tensor]]) -> None:
    """Stop unless the groups together are the trainable part of the model, each parameter once."""
    claimed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = {id(p) for _, p in named if p.requires_grad}
    assert len(claimed) == len(set(claimed)) == len(trainable), (
        "a parameter is owned twice or never"
    )
    assert set(claimed) == trainable, "the groups own something that is not in the model"
