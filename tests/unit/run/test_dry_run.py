from __future__ import annotations

from pathlib import Path

import pytest

from nemo_like.config.command_line import parse
from nemo_like.config.grpo import GRPOTree
from nemo_like.run.dry_run import dry_run_grpo

ROOT = Path(__file__).parents[3]
MEGATRON = ("policy.megatron_cfg.enabled=true", "policy.dtensor_cfg.enabled=false")


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and words of a dry run; the Megatron backend needs no model to be made."""
    default = Path("configs/grpo_math.yaml")
    code = dry_run_grpo(parse([*argv, *MEGATRON], tree=GRPOTree, default_config=default).tree)
    return code, " ".join(capsys.readouterr().out.split())


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_recipe_for_128_gpus_is_planned_on_any_machine(capsys):
    code, text = told(capsys, "--config", "recipes/llm/dapo-qwen2.5-7b.yaml")
    assert code == 0
    assert "algorithm DAPO" in text
    assert "512 prompts x 16 samples, for 16 update(s)" in text
    assert "128 on GPU, 16 node(s)" in text


def test_the_weights_that_a_run_begins_with_are_named(capsys):
    code, text = told(capsys)
    assert code == 0
    assert "the last of results/sft_tiny-" in text


def test_engines_of_their_own_take_their_gpus_from_the_policy(capsys):
    own = "policy.generation.colocated"
    apart = (f"{own}.enabled=false", f"{own}.resources.gpus_per_node=3", "cluster.gpus_per_node=8")
    assert "5 on GPU" in told(capsys, *apart)[1]


def test_a_supervised_run_that_is_not_there_is_an_error_with_its_nearest_name(capsys):
    code, text = told(capsys, "policy.sft_config=configs/sft_tinny.yaml")
    assert code == 2
    assert "did you mean configs/sft_tiny.yaml" in text
