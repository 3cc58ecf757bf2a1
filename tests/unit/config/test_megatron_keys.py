"""Every key of `policy.megatron_cfg` is read by what it speaks of, or refused before a start."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from nemo_like.config.megatron import (
    NOT_HERE,
    MegatronConfig,
    MegatronDDPConfig,
    MegatronOptimizerConfig,
)
from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.config.policy import PolicyConfig

PACKAGE = Path(__file__).parents[3] / "nemo_like"
SCHEMA_ONLY = {
    "fp16": "has one value",
    "params_dtype": "has one value",
    "bf16": "must agree with policy.precision",
    "pipeline_dtype": "must agree with policy.precision",
}
"""Keys that are settled by validation."""
OWN_BLOCKS = (
    (MegatronConfig, ""),
    (MegatronOptimizerConfig, "optimizer."),
    (MegatronDDPConfig, "distributed_data_parallel_config."),
)


def on(block: str, name: str, value: object) -> PolicyConfig:
    keys = {name: value}
    own = {block.removesuffix("."): keys} if block else keys
    return PolicyConfig(
        precision="float32", dtensor_cfg={"enabled": False}, megatron_cfg={"enabled": True} | own
    )


def test_every_key_is_read_or_refused():
    code = "\n".join(
        path.read_text()
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("megatron.py", "compat.py")
    )
    for node, block in OWN_BLOCKS:
        for name in node.model_fields.keys() - OptimizerConfig.model_fields.keys():
            if f"{block}{name}" in NOT_HERE or name in SCHEMA_ONLY:
                continue
            assert re.search(rf'[."]{name}\b', code), f"{block}{name} has no effect"


@pytest.mark.parametrize("key", NOT_HERE)
def test_what_is_not_here_is_refused_with_the_reason_and_may_be_off(key):
    block, _, name = key.rpartition(".")
    prefix = f"{block}." if block else ""
    with pytest.raises(ValidationError, match=re.escape(NOT_HERE[key])):
        on(prefix, name, 1e-3 if name == "moe_router_bias_update_rate" else True)
    on(prefix, name, 0.0 if name == "moe_router_bias_update_rate" else False)


@pytest.mark.parametrize(
    ("block", "name", "value", "message"),
    [
        ("optimizer.", "fp16", True, "fp16"),
        ("optimizer.", "params_dtype", "bfloat16", "params_dtype"),
        ("optimizer.", "bf16", True, "precision"),
        ("", "pipeline_dtype", "bfloat16", "precision"),
        ("", "recompute_modules", ("layernorm",), "recompute_modules"),
        ("", "moe_token_dispatcher_type", "flex", "moe_token_dispatcher_type"),
        ("", "empty_unused_memory_level", 3, "empty_unused_memory_level"),
        ("", "model_overrides", {"num_layers": 3}, "hf_config_overrides"),
        ("", "num_layers_in_last_pipeline_stage", 2, "one stage"),
        ("", "sequence_parallel", True, "more than one"),
    ],
)
def test_a_value_that_can_not_be_had_is_refused(block, name, value, message):
    with pytest.raises(ValidationError, match=message):
        on(block, name, value)


@pytest.mark.parametrize(
    ("optimizer", "asked", "shares"),
    [
        ("adam", None, True),
        ("adam", True, True),
        ("adam", False, False),
        ("sgd", None, True),
        ("muon", None, False),
        ("muon", False, False),
        ("dist_muon", None, True),
        ("dist_muon", False, True),
    ],
)
def test_masters_are_shared_out_but_for_muon_which_has_its_own_word_for_it(
    optimizer, asked, shares
):
    policy = PolicyConfig(
        dtensor_cfg={"enabled": False},
        megatron_cfg={
            "enabled": True,
            "optimizer": {"optimizer": optimizer, "use_distributed_optimizer": asked},
        },
    )
    assert policy.shards_optimizer is shares
