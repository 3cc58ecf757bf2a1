from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nemo_like.config.command_line import parse
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.sft import SFTTree
from nemo_like.errors import ConfigError
from nemo_like.plan.dry_run import dry_run_grpo, dry_run_sft
from tools.suites import RECIPES, tree_of

ROOT = Path(__file__).parents[3]
MEGATRON = ("policy.megatron_cfg.enabled=true", "policy.dtensor_cfg.enabled=false")


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and words of a dry run on the Megatron backend, which is told of no weights."""
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


def test_owners_and_work_are_those_of_the_megatron_backend(capsys):
    muon = "policy.megatron_cfg.optimizer.optimizer=dist_muon"
    code, text = told(capsys, "--config", "recipes/llm/dapo-qwen2.5-7b.yaml", muon)
    assert code == 0
    # Two stages of 64 ranks; of 28 layers four packed matrices each.
    assert "112 matrices" in text and "128 ranks with 0 to 1 matrices each" in text
    assert "hidden matrix: q, k and v" in text and "hidden matrix: gate and up" in text
    assert "fp32 masters" in text


def test_a_reward_that_is_not_there_is_found_before_anything_starts(capsys):
    custom = ("data.default.env_name=custom", "env.custom.reward=no_such_module:reward")
    code, text = told(capsys, "--config", "configs/grpo_math.yaml", *custom)
    assert code == 2 and "no_such_module" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "policy.megatron_cfg.pipeline_model_parallel_size=8",
            "1, 2, 4, 7, 14, 28 stages are even; 8 are with 2 layers in the first and 2 in the",
        ),
        ("policy.hf_config_overrides.hidden_act=gelu", "the Megatron backend only 'silu'"),
        ("policy.megatron_cfg.expert_model_parallel_size=2", "qwen2 has no experts"),
    ],
)
def test_what_the_model_does_not_allow_is_refused(capsys, override, message):
    code, text = told(capsys, "--config", "recipes/llm/dapo-qwen2.5-7b.yaml", override)
    assert code == 2
    assert message in text


@pytest.mark.slow
def test_235_billion_weights_are_planned_on_128_ranks(capsys):
    default = Path("configs/sft_openmathinstruct2_megatron.yaml")
    block = "policy.megatron_cfg"
    argv = [
        "policy.model_name=Qwen/Qwen3-235B-A22B",
        *("cluster.num_nodes=16", "cluster.gpus_per_node=8"),
        *(f"{block}.optimizer.optimizer=dist_muon", f"{block}.sequence_parallel=true"),
        f"{block}.tensor_model_parallel_size=8",
        f"{block}.pipeline_model_parallel_size=8",
        f"{block}.expert_model_parallel_size=8",
        f"{block}.num_layers_in_first_pipeline_stage=11",
        f"{block}.num_layers_in_last_pipeline_stage=11",
    ]
    began = time.process_time()
    assert dry_run_sft(parse(argv, tree=SFTTree, default_config=default).tree) == 0
    assert time.process_time() - began < 60
    text = " ".join(capsys.readouterr().out.split())
    assert "data 2 x pipeline 8 x expert 8 x tensor 1" in text
    assert "24,252 matrices" in text


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


@pytest.mark.parametrize("name", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_every_recipe_is_planned_without_a_network(name, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = dry_run_sft if name.startswith("sft-") else dry_run_grpo
    assert plan(tree_of(name)) == 0
    assert "One rank's memory" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_forecast_tells_what_fits_and_which_key_to_change(capsys):
    default = Path("configs/grpo_math.yaml")
    argv = ["--dry-run", "--json", "--device", "h100-80gb", "cluster.gpus_per_node=2"]
    asked = parse(argv, tree=GRPOTree, default_config=default)
    assert dry_run_grpo(asked.tree, asked.asked) == 0
    told = json.loads(capsys.readouterr().out)
    forecast = told["forecast"]
    assert forecast["misfits"] == []
    assert forecast["engine"]["sequences"] > 100
    (rank,) = forecast["ranks"].values()
    kinds = rank["fullest_moment"]
    assert kinds["optimizer state"] == pytest.approx(2 * kinds["weights"], rel=0.01)
    assert {place["data"] for place in forecast["places"]} == {0, 1}
    times = "An optimizer step at the device's stated peaks, nothing overlapped"
    shares = [row["share"] for row in told["tables"][times]]
    assert sum(float(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=0.5)


def test_what_a_dry_run_is_asked_for_belongs_to_one():
    with pytest.raises(ConfigError, match="add --dry-run"):
        parse(["--json"], tree=SFTTree, default_config=Path("configs/sft_tiny.yaml"))
