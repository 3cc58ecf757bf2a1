"""The pages of GRPO and DAPO on plain objects: what they ask of whom, and in which order."""

from dataclasses import replace

import pytest
import torch

from nemo_like.algorithms import dapo, grpo
from nemo_like.config.grpo import GRPOConfig
from nemo_like.config.loss import ClippedPGConfig
from nemo_like.errors import DataError, NoSignalError
from nemo_like.losses.clipped_pg import ClippedPG
from nemo_like.rollout.source import Drawing, RolloutsOnTime
from nemo_like.types import SamplingParams
from tests.fakes import FakeEnvironment, FakeGenerator, FakeJournal, FakePolicy, FakePrompts

PAGES = [grpo, dapo]


def second_is_right(prompt, sample):
    return float(sample == 1)


class Run:
    """One run of a page; what everybody remembers of it."""

    def __init__(
        self, page, reward=second_is_right, *, loss=None, updates=1, longest=99, **options
    ):
        self.policy, self.generator = FakePolicy(), FakeGenerator(longest)
        self.prompts = FakePrompts()
        self.journal = FakeJournal(last_step=options.pop("steps", 2))
        self.validated, self.checked = [], []
        defaults = {
            "num_prompts_per_step": 2, "num_generations_per_prompt": 4, "val_period": 0,
            "val_at_start": False, "val_at_end": False,
        }  # fmt: skip
        settings = GRPOConfig(**defaults | options)
        drawing = Drawing(
            self.prompts, self.generator, FakeEnvironment(reward),
            SamplingParams(max_new_tokens=8, seed=7),
            num_prompts=round(settings.num_prompts_per_step * settings.batch_multiplier),
            num_samples=settings.num_generations_per_prompt,
        )  # fmt: skip
        page.train(
            self.policy,
            RolloutsOnTime(drawing, self.policy),
            lambda step: self.validated.append(step) or {},
            self.journal,
            lambda step, stats: self.checked.append(step),
            grpo=settings,
            loss=ClippedPG(ClippedPGConfig(**{"reference_policy_kl_penalty": 0.0} | (loss or {}))),
            num_updates=updates,
        )

    @property
    def batch(self):
        return self.policy.batches[0]


@pytest.mark.parametrize("page", PAGES)
def test_a_step_syncs_draws_judges_and_trains_on_its_groups(page):
    run = Run(page, normalize_rewards=False, use_leave_one_out_baseline=False)
    assert run.generator.synced_at == [-1.0, -0.5], "the weights of each step's start"
    assert run.prompts.taken == 4 and len(run.policy.batches) == 2
    batch = run.batch
    # Two prompts of one token, each with samples of 1, 2, 3 and 4 tokens; the second is right.
    assert batch.lengths_B.tolist() == [2, 3, 4, 5] * 2
    assert batch.token_ids_N[:5].tolist() == [0, 0, 0, 0, 1]
    assert batch.loss_mask_N[:5].tolist() == [False, True, False, True, True]
    assert batch.advantages_N[:9].tolist() == [0, -0.25, 0, 0.75, 0.75, 0, -0.25, -0.25, -0.25]
    assert batch.sampled_logprobs_N[:5].tolist() == [0, -1, 0, -1, -1]
    assert (batch.num_loss_tokens, batch.num_sequences) == (20, 8)
    assert run.journal.metrics["reward"] == 0.25
    assert run.journal.metrics["mean_gen_tokens_per_sample"] == 2.5


@pytest.mark.parametrize("page", PAGES)
def test_the_dice_of_every_step_are_its_own(page):
    seeds = Run(page, steps=3).generator.seeds
    assert len(set(seeds)) == 3 and seeds == Run(page, steps=3).generator.seeds


@pytest.mark.parametrize("page", PAGES)
def test_one_update_needs_no_old_log_probabilities_and_several_keep_those_of_the_start(page):
    assert Run(page).batch.old_logprobs_N is None
    run = Run(page, updates=4, steps=1)
    old = [
        batch.old_logprobs_N[batch.loss_mask_N].unique().tolist() for batch in run.policy.batches
    ]
    assert old == [[-1.0]] * 4
    assert [batch.num_sequences for batch in run.policy.batches] == [2] * 4
    assert [batch.num_loss_tokens for batch in run.policy.batches] == [3, 7, 3, 7]


@pytest.mark.parametrize("page", PAGES)
def test_the_start_weights_are_asked_only_for_a_divergence_that_counts(page):
    assert Run(page).batch.ref_logprobs_N is None
    run = Run(page, loss={"reference_policy_kl_penalty": 0.1})
    second = run.policy.batches[1]
    assert second.ref_logprobs_N[second.loss_mask_N].unique().tolist() == [-1.0]


@pytest.mark.parametrize("page", PAGES)
def test_truncated_answers_are_left_out_where_they_are_filtered(page):
    run = Run(page, longest=4, overlong_filtering=True, use_leave_one_out_baseline=False)
    batch = run.batch
    assert (batch.num_sequences, batch.num_loss_tokens) == (6, 12)
    assert not batch.loss_mask_N[10:14].any() and not batch.advantages_N[10:14].any()


@pytest.mark.parametrize("page", PAGES)
def test_an_update_of_truncated_answers_alone_is_left_out_and_a_step_of_them_is_an_error(page):
    filtered = {"overlong_filtering": True, "use_leave_one_out_baseline": False}
    run = Run(page, longest=3, updates=4, **filtered)
    assert [batch.num_loss_tokens for batch in run.policy.batches] == [3, 3] * 2
    assert run.policy.steps == [1, 1, 2, 2]
    with pytest.raises(NoSignalError, match=r"step 1: all 8 answers were cut off.*max_new_tokens"):
        Run(page, longest=1, updates=4, **filtered)


@pytest.mark.parametrize("page", PAGES)
def test_rewards_are_scaled_before_they_are_compared(page):
    scaling = {"enabled": True, "source_max": 1.0, "target_min": -1.0, "target_max": 1.0}
    plain, scaled = ({"normalize_rewards": False}, {"reward_scaling": scaling})
    assert torch.equal(
        Run(page, **plain, **scaled).batch.advantages_N, 2 * Run(page, **plain).batch.advantages_N
    )


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_the_run_and_shows_the_answer(page, reward):
    with pytest.raises(DataError, match="expected one finite number each; .* for '0.0'"):
        Run(page, lambda prompt, sample: reward)


@pytest.mark.parametrize("page", PAGES)
def test_validation_happens_at_the_start_when_it_is_due_and_at_the_end(page):
    run = Run(page, steps=5, val_period=2, val_at_start=True, val_at_end=True)
    assert run.validated == [0, 2, 4, 5]


def test_reinforce_plus_plus_standardises_over_all_tokens_of_the_batch():
    run = Run(grpo, adv_estimator={"name": "reinforce_plus_plus", "minus_baseline": False})
    counted = run.batch.advantages_N[run.batch.loss_mask_N]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-6)
    assert float(counted.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_a_divergence_in_the_reward_falls_on_the_tokens_that_led_to_it():
    estimator = {"name": "reinforce_plus_plus", "minus_baseline": True}
    loss = {
        "reference_policy_kl_penalty": 0.5, "use_kl_in_reward": True,
        "reference_policy_kl_type": "k1", "kl_input_clamp_value": None,
    }  # fmt: skip
    run = Run(grpo, lambda prompt, sample: 0.0, adv_estimator=estimator, loss=loss)
    second = run.policy.batches[1]  # old -0.5, start -1: every token costs 0.5 x 0.5
    longest = second.advantages_N[-4:]
    steps = longest.diff()
    assert (steps > 0).all() and torch.allclose(steps, steps[:1].expand(3))


def even_prompts_teach(prompt, sample):
    return float(sample == 1 and prompt % 2 == 0)


def test_dynamic_sampling_draws_until_every_group_can_teach():
    run = Run(dapo, even_prompts_teach, use_dynamic_sampling=True, steps=1)
    assert run.prompts.taken == 4 and len(set(run.generator.seeds)) == 2
    firsts = run.batch.token_ids_N[run.batch.lengths_B.cumsum(0) - run.batch.lengths_B]
    assert firsts.tolist() == [0] * 4 + [2] * 4
    assert run.journal.metrics["dynamic_sampling_num_gen_batches"] == 2
    assert run.journal.metrics["dynamic_sampling_kept_groups"] == 0.5
    assert run.journal.metrics["reward"] == 0.25, "of the groups that are trained on"


def test_dynamic_sampling_leaves_what_a_step_does_not_need():
    run = Run(dapo, use_dynamic_sampling=True, batch_multiplier=1.5, steps=1)
    assert run.prompts.taken == 3 and len(run.batch) == 8
    assert run.journal.metrics["dynamic_sampling_num_discarded_valid_samples"] == 4


def starving(**options):
    return Run(
        dapo, lambda prompt, sample: float(sample == 1 and prompt == 2),
        use_dynamic_sampling=True, dynamic_sampling_max_gen_batches=3, **options,
    )  # fmt: skip


def test_starvation_is_an_error_that_counts_what_was_drawn():
    with pytest.raises(NoSignalError, match="1 of 6 groups in 3 batches have rewards that differ"):
        starving()


def test_starvation_may_end_the_run_before_the_step():
    run = starving(on_starvation="stop")
    assert not run.policy.batches
    assert [event[0] for event in run.journal.events] == ["stop"]


def test_starvation_may_train_on_what_was_kept_but_not_on_nothing():
    run = starving(on_starvation="train_on_kept", steps=1)
    assert len(run.policy.batches[0]) == 4
    with pytest.raises(NoSignalError, match="0 of 6 groups"):
        Run(
            dapo, lambda prompt, sample: 1.0, use_dynamic_sampling=True,
            dynamic_sampling_max_gen_batches=3, on_starvation="train_on_kept",
        )  # fmt: skip


def test_long_answers_cost_and_groups_are_chosen_by_rewards_without_that():
    shaping = {
        "enabled": True, "overlong_buffer_length": 2, "max_response_length": 4,
        "overlong_buffer_penalty": 1.0,
    }  # fmt: skip
    plain = {"normalize_rewards": False, "use_leave_one_out_baseline": False, "steps": 1}
    run = Run(dapo, reward_shaping=shaping, **plain)
    # Raw 0 1 0 0, and 3 and 4 tokens cost 0.5 and 1.
    expected = torch.tensor([0.0, 1.0, -0.5, -1.0]) - (-0.125)
    starts = (run.batch.lengths_B.cumsum(0) - run.batch.lengths_B)[:4] + 1
    assert torch.allclose(run.batch.advantages_N[starts], expected)
    assert run.journal.metrics["shaped_reward"] == pytest.approx(-0.125)
    assert run.journal.metrics["reward"] == 0.25
    with pytest.raises(NoSignalError):
        Run(dapo, lambda *_: 0.0, reward_shaping=shaping, use_dynamic_sampling=True)


def test_a_smaller_step_is_cut_into_as_many_updates_as_it_can_be():
    batch = Run(grpo, steps=1).batch
    three = batch.select([0, 1, 2])
    assert [len(part) for part in three.split(2)] == [2, 1]
    assert [len(part) for part in three.split(5)] == [1, 1, 1]
    masked = replace(three, loss_mask_N=three.loss_mask_N & (three.token_ids_N > 90))
    assert [part.num_sequences for part in masked.split(1)] == [0]
