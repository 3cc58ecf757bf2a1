"""A run of GRPO or DAPO that is interrupted and continued is the run that was not, to the bit."""

import pytest

from nemo_like.errors import EXIT_INTERRUPTED, CheckpointError
from tests.e2e.commands import ONE_STEP_AT_A_TIME, Place, continues_exactly, grpo, words

STEPS = 4
EVERY_STEP = (
    f"grpo.max_num_steps={STEPS}", "checkpointing.save_period=1", "grpo.val_period=2",
    "grpo.val_num_generations_per_prompt=2", "policy.scheduler.lr_warmup_iters=2",
    "policy.scheduler.lr_decay_style=cosine",
)  # fmt: skip
GRPO = (
    "policy.train_global_batch_size=8",  # two updates a step
    "loss_fn.reference_policy_kl_penalty=0.1",
)
AHEAD = (
    *GRPO,
    "grpo.async_grpo.enabled=true",
    "grpo.async_grpo.max_trajectory_age_steps=2",
    "policy.generation.colocated.enabled=false",
    "loss_fn.use_importance_sampling_correction=true",
)
DAPO = (
    "--config=configs/dapo_math.yaml",
    "grpo.batch_multiplier=1.5",  # of the last batch of a step some prompts are left
    "grpo.reward_shaping.max_response_length=20",
)


def resumes_exactly(root, *settings):
    """The run in one go, after it was compared with the same run stopped after every step."""
    settings = (*EVERY_STEP, *settings)
    straight = continues_exactly(grpo, lambda place: place.grpo_argv(*settings), root, STEPS)
    broken = Place(root / "broken")
    answers = [(place.log / "samples.jsonl").read_text() for place in (straight, broken)]
    assert answers[0] == answers[1] != ""
    return straight


def rewards(place):
    return [line["train/reward"] for line in place.values()]


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("muon", marks=pytest.mark.slow)])
def test_grpo_interrupted_after_every_step_equals_the_uninterrupted_run(
    tmp_path, sft_config, optimizer
):
    run = resumes_exactly(
        tmp_path,
        *GRPO,
        f"policy.sft_config={sft_config}",
        f"policy.optimizer.optimizer={optimizer}",
    )
    assert len(set(rewards(run))) > 1, "nothing was learned from"
    kl = [line["train/kl_penalty"] for line in run.values()]
    assert 0 <= kl[0] < 1e-3 < kl[-1], "the reference is not the start"


def test_rollouts_drawn_ahead_outlive_an_interruption(tmp_path, sft_config):
    run = resumes_exactly(tmp_path, *AHEAD, f"policy.sft_config={sft_config}")
    assert [line["train/rollout_age_steps"] for line in run.values()] == [0, 1, 2, 1]
    kept = [sorted(f.name for f in run.step(n).glob("rollouts/*")) for n in range(1, STEPS + 1)]
    assert kept == [["step_2.json", "step_3.json"], ["step_3.json"], ["step_4.json"], []]
    assert len(set(rewards(run))) > 1, "nothing was learned from"
    errors = [line["train/token_mult_prob_error"] for line in run.values()]
    assert errors[2] > 1.001, "rollouts of older weights are not the policy's"
    probed = [line.get("train/probe_mult_prob_error") for line in run.values()]
    assert probed[1] is probed[3] is None and max(probed[0], probed[2]) < 1.0001


def test_a_run_does_not_continue_on_time_what_was_drawn_ahead(tmp_path, sft_config, capsys):
    place = Place(tmp_path)
    start = f"policy.sft_config={sft_config}"
    argv = place.grpo_argv(*EVERY_STEP, *AHEAD, start, "grpo.val_period=0")
    assert grpo([*argv, ONE_STEP_AT_A_TIME]) == EXIT_INTERRUPTED
    capsys.readouterr()
    assert grpo([*argv, "grpo.async_grpo.enabled=false"]) == CheckpointError.exit_code
    assert "set grpo.async_grpo.enabled=true again" in words(capsys.readouterr().out)


def test_a_run_keeps_its_reference_though_the_supervised_run_went_on(tmp_path, capsys):
    start, place = Place(tmp_path / "supervised"), Place(tmp_path / "run")
    file = start.root / "short.yaml"
    settings = (
        *EVERY_STEP,
        *GRPO,
        f"policy.sft_config={file}",
        "grpo.val_period=0",
    )
    start.root.mkdir()
    file.write_text(start.supervised_config(2))
    assert grpo(place.grpo_argv(*settings, ONE_STEP_AT_A_TIME)) == EXIT_INTERRUPTED
    file.write_text(start.supervised_config(3))
    assert grpo(place.grpo_argv(*settings, ONE_STEP_AT_A_TIME)) == EXIT_INTERRUPTED
    assert start.steps() == [2], "the start of a run that continues is made again"
    assert f"model_name: {start.step(2) / 'hf'}" in (place.step(2) / "config.yaml").read_text()
    start.step(2).rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert grpo(place.grpo_argv(*settings)) == 2
    assert "reference_policy_kl_penalty" in words(capsys.readouterr().out)


@pytest.mark.parametrize("optimizer", [pytest.param("adam", marks=pytest.mark.slow), "muon"])
def test_dapo_interrupted_after_every_step_equals_the_uninterrupted_run(
    tmp_path, sft_config, optimizer
):
    run = resumes_exactly(
        tmp_path,
        *DAPO,
        f"policy.sft_config={sft_config}",
        f"policy.optimizer.optimizer={optimizer}",
    )
    drawn = [line["train/dynamic_sampling_num_gen_batches"] for line in run.values()]
    assert max(drawn) > 1, "no step drew a second batch"
