"""The commands of GRPO and DAPO: Ray, vLLM on a CPU, and a policy that learns from its answers."""

import shutil

import pytest

from tests.e2e.commands import GRPO_SCRIPT, Place, contents, start, words

STEPS = 3
SETTINGS = (
    "cluster.gpus_per_node=0", f"grpo.max_num_steps={STEPS}", "data.train.num_rows=2000",
    "data.validation.num_rows=64", "checkpointing.save_period=1", "checkpointing.keep_top_k=null",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("vllm_installed")


def run(place, sft_config, *settings):
    """What the command said, which ended well."""
    argv = [*settings, *SETTINGS, f"policy.sft_config={sft_config}", *place.folders]
    output, _ = start(argv, GRPO_SCRIPT).communicate(timeout=300)
    said = words(output)
    assert "--- Done ---" in said, output
    return said


def assert_learned_from_its_answers(place):
    trained = [line for line in place.logged() if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    for line in trained:
        assert 0 < line["train/reward"] < 1 and line["train/grad_norm"] > 0
        assert 1 <= line["train/token_mult_prob_error"] < 1.0001, "engine and policy differ"
    validated = [line["step"] for line in place.logged() if "validation/accuracy" in line]
    assert validated == [0, STEPS]


@pytest.fixture(scope="module")
def dapo_muon(tmp_path_factory, sft_config):
    place = Place(tmp_path_factory.mktemp("dapo"))
    command = (
        "--config", "configs/dapo_math.yaml", "policy.optimizer.optimizer=muon",
        "policy.generation.refit_transport=broadcast",
    )  # fmt: skip
    return place, command, run(place, sft_config, *command)


def test_grpo_with_adamw_makes_its_start_and_learns(place, sft_config):
    said = run(place, sft_config, "policy.generation.refit_transport=ipc")
    assert_learned_from_its_answers(place)
    assert said.count("Next:") == 1 and "policy.optimizer.optimizer=muon" in said
    assert "adamw" in said and (place.log / "report.html").exists()
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(place.step(STEPS) / "hf")


def test_dapo_with_muon_learns(dapo_muon):
    place, _, said = dapo_muon
    assert_learned_from_its_answers(place)
    assert "muon" in said
    assert all(
        "train/dynamic_sampling_num_gen_batches" in line for line in place.logged() if line["step"]
    )


@pytest.mark.slow
def test_dapo_with_muon_and_vllm_continues_to_the_bit(dapo_muon, sft_config):
    place, command, _ = dapo_muon
    state = ("model", "optimizer", "rng", "routing.json", "hf")
    expected = {step: contents(place.step(step), *state) for step in (2, 3)}
    values = place.values()
    for step in expected:
        shutil.rmtree(place.step(step))
    assert f"continuing from {place.step(1)}" in run(place, sft_config, *command)
    for step, files in expected.items():
        found = contents(place.step(step), *state)
        assert found.keys() == files.keys()
        assert [name for name in files if found[name] != files[name]] == [], f"step {step}"
    assert place.values() == values


@pytest.mark.slow
def test_megatron_and_layer_wise_muon_learn(place, sft_config):
    megatron = (
        "policy.megatron_cfg.enabled=true", "policy.dtensor_cfg.enabled=false",
        "policy.megatron_cfg.tensor_model_parallel_size=2", "cluster.cpu_workers_per_node=2",
        "policy.optimizer.optimizer=dist_muon",
    )  # fmt: skip
    assert "muon" in run(place, sft_config, *megatron)
    assert_learned_from_its_answers(place)
