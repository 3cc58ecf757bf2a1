"""From the configuration to the optimizer, and to the table of what it owns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.errors import ConfigError
from nemo_like.optim.combined import CombinedOptimizer
from nemo_like.optim.muon import MuonRule
from nemo_like.optim.routing import Algorithm, Routing, route
from nemo_like.optim.scale import default_extra_factor

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
) -> tuple[CombinedOptimizer, Routing]:
    """The optimizer of all trainable parameters, and who owns each of them and why.

    `embeddings` names parameters that are known to be embeddings or output heads (see
    `routing.embedding_names`); well-known names are recognised without.

    Raises:
        ConfigError: a parameter or a setting does not allow it; the message names the key.
    """
    named = list(named_parameters)
    algorithm = ALGORITHMS[config.optimizer]
    _refuse_blockwise(config)
    routing = route(
        named,
        algorithm,
        embeddings=embeddings,
        include=config.muon_include,
        exclude=config.muon_exclude,
    )
    by_name = dict(named)
    groups = [
        {
            "params": [(name, by_name[name]) for name in routing.names(owner)],
            "algorithm": owner,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            **_settings(owner, config),
        }
        for owner in dict.fromkeys(row.optimizer for row in routing.rows)
    ]
    optimizer = CombinedOptimizer(groups)
    _prove_all_claimed(optimizer, named)
    return optimizer, routing


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
        coefficient_type=config.muon_coefficient_type,
        ns_steps=config.muon_num_ns_steps,
        ns_dtype=dtype,
    )


def _settings(owner: Algorithm, config: OptimizerConfig) -> dict[str, Any]:
    match owner:
        case "muon":
            return {"rule": muon_rule(config)}
        case "adamw":
            return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
        case "sgd":
            return {"momentum": config.sgd_momentum}


def _refuse_blockwise(config: OptimizerConfig) -> None:
    if ALGORITHMS[config.optimizer] == "muon" and config.muon_tp_mode == "blockwise":
        raise ConfigError(
            "muon_tp_mode=blockwise orthogonalises the part of a matrix that one rank holds, so "
            "that the update depends on tensor_parallel_size (30 to 50 % of it at size 2); set "
            "it to duplicated or distributed, which are exact on every layout"
        )


def _prove_all_claimed(optimizer: CombinedOptimizer, named: list[tuple[str, Tensor]]) -> None:
    """Stop unless the groups together are the trainable part of the model, each parameter once."""
    claimed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = {id(p) for _, p in named if p.requires_grad}
    assert len(claimed) == len(set(claimed)) == len(trainable), (
        "a parameter is owned twice or never"
    )
    assert set(claimed) == trainable, "the groups own something that is not in the model"
