"""However a run of GRPO ends, its code and its last words say why."""

import os
import signal

from nemo_like.errors import EXIT_INTERRUPTED
from tests.e2e.commands import grpo, start_fork, wait_until, words

NEWBORN = ("policy.sft_config=null", "policy.init=random", "grpo.max_num_steps=2")


def ended(place, capsys, *settings):
    """The exit code, and all that was said."""
    code = grpo(place.grpo_argv(*NEWBORN, *settings))
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, words(printed.out + printed.err)


def test_a_misspelt_key_is_found_before_anything_starts(place, capsys):
    code, said = ended(place, capsys, "grpo.num_generation_per_prompt=4")
    assert code == 2 and "did you mean grpo.num_generations_per_prompt?" in said
    assert not (place.root / "logs").exists()


def test_engine_and_policy_that_differ_end_the_run_with_the_keys_that_can_make_them_agree(
    place, capsys
):
    code, said = ended(
        place,
        capsys,
        "policy.generation.top_k=2",
        "policy.generation.mismatch.max_token_mult_prob_error=1.0000001",
    )
    assert code == 8 and place.steps() == []
    for key in (
        "policy.generation.mismatch.max_token_mult_prob_error",
        "policy.generation.vllm_cfg.precision",
        "top_k=null",
    ):
        assert key in said


def test_engine_and_policy_that_differ_are_only_told_of_if_that_is_asked_for(place, capsys):
    code, said = ended(
        place,
        capsys,
        "policy.generation.top_k=2",
        "policy.generation.mismatch.action=warn",
        "policy.generation.mismatch.max_token_mult_prob_error=1.0000001",
    )
    assert code == 0 and "step 2: engine and policy differ by a factor of" in said


def custom(reward):
    names = (f"data.{part}.env_name=custom" for part in ("train", "validation"))
    return (*names, f"env.custom.reward={reward}")


def test_a_reward_that_is_not_there_ends_the_run_as_a_wrong_configuration(place, capsys):
    code, said = ended(place, capsys, *custom("json:rate"))
    assert code == 2 and "env.custom: json:rate can not be a reward" in said


def test_a_reward_that_fails_ends_the_run_with_the_answer_it_failed_for(place, capsys):
    code, said = ended(place, capsys, *custom("operator:setitem"))
    assert code == 3 and "operator:setitem raised TypeError" in said and "for the answer" in said
    assert place.steps() == []


def test_dapo_that_finds_no_group_to_learn_from_says_so(place, capsys):
    code, said = ended(
        place, capsys, "grpo.use_dynamic_sampling=true", "grpo.dynamic_sampling_max_gen_batches=2"
    )
    assert code == 5 and "0 of 8 groups in 2 batches" in said


def test_dapo_that_is_to_stop_when_it_starves_says_where_it_was(place, capsys):
    code, said = ended(
        place, capsys, "grpo.use_dynamic_sampling=true", "grpo.on_starvation=stop",
        "grpo.dynamic_sampling_max_gen_batches=2",
    )  # fmt: skip
    assert code == 5 and "Stopped" in said and "at step 0 of 2" in said and "Next:" not in said


def test_a_start_that_does_not_exist_is_a_wrong_configuration(place, capsys):
    code, said = ended(place, capsys, "policy.init=pretrained", "policy.sft_config=configs/st.yaml")
    assert code == 2 and "there is no such file" in said


def test_a_signal_finishes_the_step_saves_and_the_same_command_continues(place, capsys):
    long = place.grpo_argv(
        *NEWBORN,
        "grpo.max_num_steps=500",
        "grpo.max_num_epochs=100",
        "checkpointing.save_period=1000",
    )
    process = start_fork(long, place.root / "output", grpo)
    try:
        wait_until(lambda: len(place.logged()) >= 2)
        os.kill(process.pid, signal.SIGTERM)
        process.join(timeout=60)
    finally:
        process.kill()
        process.join()
    said = words((place.root / "output").read_text())
    assert process.exitcode == EXIT_INTERRUPTED, said
    (saved,) = place.steps()
    assert f"stopped by SIGTERM at step {saved} of 500" in said
    again = [*long, "checkpointing.checkpoint_must_save_by=00:00:00:00"]
    assert grpo(again) == EXIT_INTERRUPTED
    assert place.steps() == [saved, saved + 1]
    assert f"continuing from {place.step(saved)}" in capsys.readouterr().out
