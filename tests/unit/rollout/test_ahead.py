"""Rollouts that are drawn while steps train: which weights draw what, and what a stop leaves."""

import threading
import time

import pytest

from nemo_like.algorithms import dapo, grpo
from nemo_like.checkpoint import rollouts as stored
from nemo_like.config.grpo import GRPOConfig
from nemo_like.config.loss import ClippedPGConfig
from nemo_like.errors import CheckpointError, DataError, WorkerError
from nemo_like.losses.clipped_pg import ClippedPG
from nemo_like.rollout.ahead import RolloutsAhead
from nemo_like.rollout.source import Drawing
from nemo_like.types import SamplingParams
from tests.fakes import FakeEnvironment, FakeGenerator, FakeJournal, FakePolicy, FakePrompts

LOSS = ClippedPGConfig(reference_policy_kl_penalty=0.0, use_importance_sampling_correction=True)
IN_TIME_S = 10.0


class SteadyGenerator(FakeGenerator):
    """Refuses new weights while it draws; `before` is called in every draw that is no probe."""

    def __init__(self, before=lambda: None):
        super().__init__()
        self.before = before
        self.is_drawing = False
        self.closed = threading.Event()

    def sync(self, policy):
        assert not self.is_drawing, "new weights in the middle of a batch"
        super().sync(policy)

    def generate(self, prompts, sampling):
        assert not self.is_drawing, "two draws at the same time"
        self.is_drawing = True
        try:
            if len({prompt.index for prompt in prompts}) < len(prompts):
                self.before()
            return super().generate(prompts, sampling)
        finally:
            self.is_drawing = False

    def close(self):
        self.closed.set()


class Run:
    """A run of a page whose rollouts are drawn ahead; what it did, step by step."""

    def __init__(
        self, *, age=1, steps=8, page=grpo, policy=None, generator=None, reward=None, before=None
    ):
        self.page, self.steps = page, steps
        self.policy = policy or FakePolicy()
        self.generator = generator or SteadyGenerator()
        self.prompts = FakePrompts()
        reward = reward or (lambda prompt, sample: float(sample == prompt % 4))
        drawing = Drawing(
            self.prompts, self.generator, FakeEnvironment(reward),
            SamplingParams(max_new_tokens=8, seed=7), num_prompts=2, num_samples=4,
        )  # fmt: skip
        self.rollouts = RolloutsAhead(drawing, self.policy, max_age_steps=age)
        self.ages, self.probes = [], []

    def train(self, *, first=1, stop_after=None, validate=None, **options):
        self.journal = FakeJournal(self.steps, first_step=first, stop_after=stop_after)
        settings = {"val_period": 0, "val_at_start": False, "val_at_end": False} | options
        self.page.train(
            self.policy,
            self.rollouts,
            validate or (lambda step: {}),
            self.journal,
            self.check,
            grpo=GRPOConfig(num_prompts_per_step=2, num_generations_per_prompt=4, **settings),
            loss=ClippedPG(LOSS),
            num_updates=1,
        )
        return self

    def check(self, step, stats):
        self.ages.append(stats.metrics["rollout_age_steps"].value)
        probed = stats.metrics.get("probe_mult_prob_error")
        self.probes.append(None if probed is None else probed.value)

    @property
    def drawn_by(self):
        """How many steps the weights had been trained for that drew for each step."""
        drew = [float(b.sampled_logprobs_N[b.loss_mask_N][0]) for b in self.policy.batches]
        return [{-(0.5**n): n for n in range(20)}[logprob] for logprob in drew]

    @property
    def tokens(self):
        return [batch.token_ids_N.tolist() for batch in self.policy.batches]


@pytest.mark.parametrize("page", [grpo, dapo])
@pytest.mark.parametrize(
    ("age", "drawn_by"),
    [(1, [0, 0, 1, 2, 3, 4, 5, 6]), (2, [0, 0, 0, 2, 2, 4, 4, 6]), (3, [0, 0, 0, 0, 3, 3, 3, 6])],
)
def test_rollouts_are_as_old_as_the_number_of_the_step_says_and_never_older_than_allowed(
    page, age, drawn_by
):
    run = Run(age=age, page=page).train()
    assert run.drawn_by == drawn_by
    assert run.ages == [step - 1 - drew for step, drew in enumerate(drawn_by, start=1)]
    assert max(run.ages) == age
    assert run.prompts.taken == 2 * run.steps, "nothing is drawn for steps that are not"


def test_who_is_faster_changes_nothing():
    def quick_then_slow():
        time.sleep(0.003 * (len(run.generator.seeds) % 3))

    run = Run(age=2)
    run.generator.before = quick_then_slow
    run.train()
    straight = Run(age=2).train()
    assert run.tokens == straight.tokens and run.drawn_by == straight.drawn_by
    assert run.generator.seeds == straight.generator.seeds


def test_a_step_trains_while_the_rollouts_of_the_next_are_drawn():
    has_begun, has_trained = threading.Event(), threading.Event()

    class Policy(FakePolicy):
        def train_step(self, batch, loss, *, step=None):
            assert has_begun.wait(IN_TIME_S)
            has_trained.set()
            return super().train_step(batch, loss, step=step)

    def second_waits():
        if len(run.generator.seeds) == 2:  # after the probe and the first step's
            has_begun.set()
            assert has_trained.wait(IN_TIME_S)

    run = Run(steps=2, policy=Policy())
    run.generator.before = second_waits
    assert run.train().ages == [0, 1]


def test_agreement_is_measured_where_weights_were_just_sent_and_sees_no_age():
    assert Run(age=1, steps=4).train().probes == [1.0, 1.0, 1.0, None], "the last draws nothing"
    assert Run(age=3, steps=6).train().probes == [1.0, None, None, 1.0, None, None]

    class Wrong(SteadyGenerator):
        def sync(self, policy):
            super().sync(policy)
            self.synced_at[-1] -= 1.0

    assert Run(steps=2, generator=Wrong()).train().probes[0] == pytest.approx(2.71828, abs=1e-4)


@pytest.mark.parametrize("age", [1, 2, 3])
@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_that_stops_and_goes_on_draws_what_the_uninterrupted_one_does(tmp_path, age, stop):
    straight = Run(age=age).train()
    first = Run(age=age).train(stop_after=stop)
    stored.write(tmp_path, first.rollouts.pending())
    second = Run(age=age, policy=first.policy)
    second.prompts.taken = first.prompts.taken
    second.rollouts.restore(stored.read(tmp_path))
    second.train(first=stop + 1)
    assert second.tokens == straight.tokens and second.drawn_by == straight.drawn_by
    assert first.ages + second.ages == straight.ages
    assert second.prompts.taken == straight.prompts.taken


def test_an_error_in_the_background_is_raised_by_the_step_that_needs_its_rollouts(tmp_path):
    def reward(prompt, sample):
        return float("nan") if prompt == 4 and is_broken else 1.0

    is_broken = True
    run = Run(age=2, reward=reward)
    with pytest.raises(DataError, match="nan for '4.0'"):
        run.train()
    assert [event for event in run.journal.events if event[0] == "end"] == [("end", 1), ("end", 2)]

    # What was saved after the second step has the prompts of the third, and nothing is skipped.
    run = Run(age=2, reward=reward).train(stop_after=2)
    stored.write(tmp_path, run.rollouts.pending())
    is_broken = False
    mended = Run(age=2, reward=reward, policy=run.policy)
    mended.prompts.taken = run.prompts.taken
    mended.rollouts.restore(stored.read(tmp_path))
    mended.train(first=3)
    assert mended.ages[0] == 0, "the weights of then are gone"
    assert mended.tokens == Run(age=2, reward=reward).train().tokens


def test_prompts_of_a_failed_drawing_are_kept_until_their_step_comes(tmp_path):
    def reward(prompt, sample):
        return float("nan") if prompt == 6 and is_broken else 1.0

    is_broken = True
    run = Run(age=3, reward=reward).train(stop_after=1)
    run.rollouts.settle()  # 2 and 3 are drawn, 4 has failed
    is_broken = False
    for step in (2, 3):
        folder = tmp_path / str(step)
        folder.mkdir()
        stored.write(folder, run.rollouts.pending())
        taken, done = run.prompts.taken, run.policy
        run = Run(age=3, reward=reward, policy=done)
        run.prompts.taken = taken
        run.rollouts.restore(stored.read(folder))
        run.train(first=step, stop_after=step if step == 2 else None)
    assert run.tokens == Run(age=3, reward=reward).train().tokens


def test_rollouts_that_would_be_too_old_are_refused_by_the_key_to_set():
    pending = Run(age=3).train(stop_after=1).rollouts.pending()
    assert [one.step for one in pending] == [2, 3, 4]
    with pytest.raises(CheckpointError, match=r"2 steps old.*max_trajectory_age_steps=1.*to 2"):
        Run(age=1).rollouts.restore(pending)


def test_a_validation_finds_the_engines_at_rest():
    def slow_at_the_end():
        if len(run.generator.seeds) == 4:  # the fourth step's, after a probe
            time.sleep(0.1)

    run = Run(age=3)
    run.generator.before = slow_at_the_end
    drawn = []

    def validate(step):
        run.rollouts.settle()
        drawn.append(len(run.generator.seeds))
        run.generator.sync(run.policy)
        return {}

    run.train(validate=validate, val_period=2, val_at_start=True)
    assert drawn == [0, 5, 9, 9, 11], "with a probe before the steps 1, 4 and 7"
    straight = Run(age=3).train()
    assert run.drawn_by == straight.drawn_by and run.tokens == straight.tokens


def test_closing_ends_what_is_being_drawn_and_what_waits():
    def until_closed():
        if len(run.generator.seeds) == 2:  # after the probe and the first step's
            assert run.generator.closed.wait(IN_TIME_S)
            raise WorkerError("the engines are closed")

    run = Run(age=3)
    run.generator.before = until_closed
    run.train(stop_after=1)
    began = time.monotonic()
    run.rollouts.close()
    run.rollouts.close()
    assert time.monotonic() - began < IN_TIME_S / 2
    assert run.generator.closed.is_set() and len(run.generator.seeds) == 2
