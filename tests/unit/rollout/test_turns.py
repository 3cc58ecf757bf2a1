"""Rollouts of several turns: whose tokens are whose, whose dice, and what ends them."""

from dataclasses import replace

import pytest
import torch

from nemo_like.algorithms.evaluate import evaluate
from nemo_like.errors import DataError
from nemo_like.interfaces import Environment
from nemo_like.observability.records import Answer
from nemo_like.rollout.collect import collect, lengths_of, rollout_batch, rollout_metrics, truncated
from nemo_like.rollout.turns import ConversingGenerator
from nemo_like.types import Prompt, SamplingParams
from tests.fakes import FakeReplier, FakeTalker

SAMPLING = SamplingParams(max_new_tokens=8, stop_token_ids=(FakeTalker.END,), seed=5)
CALLS = {"p": ["7*6!", "so 42*"], "q": ["no*"], "r": ["1+1!", "2!", "it is 2*"]}


def question(text, index=0):
    return Prompt(index, tuple(map(ord, text)), text, "")


def calls(text):
    """A number for what ends in a call."""
    return "42" if text.endswith("!") else None


def talk(script, reply=calls, *, max_turns=9, max_length=99):
    """A generator of conversations, what answers in it, and what replies."""
    talker, replier = FakeTalker(script), FakeReplier(reply)
    generator = ConversingGenerator(
        talker, replier, replier, max_turns=max_turns, max_length=max_length
    )
    return generator, talker, replier


def said(rollouts):
    return [rollout.text for rollout in rollouts]


def test_the_model_goes_on_with_what_it_had_said_and_was_told():
    generator, talker, replier = talk(CALLS)
    prompts = [question("p"), question("q", 1), question("r", 2)]
    rollouts = generator.generate(prompts, SAMPLING)
    assert said(rollouts) == ["7*6!42so 42", "no", "1+1!422!42it is 2"]
    # Every turn is one call with all that are still open, each with all its tokens so far.
    assert [["".join(map(chr, p.token_ids)) for p in asked] for asked, _, _ in talker.calls] == [
        ["p", "q", "r"],
        ["p7*6!42", "r1+1!42"],
        ["r1+1!422!42"],
    ]
    assert replier.asked == [
        ["7*6!", "no", "1+1!"],
        ["7*6!42so 42", "1+1!422!"],
        ["1+1!422!42it is 2"],
    ]
    assert [rollout.prompt for rollout in rollouts] == prompts
    assert [rollout.num_turns for rollout in rollouts] == [2, 1, 3]
    assert [rollout.latest for rollout in rollouts] == ["so 42", "no", "it is 2"]
    assert [rollout.weights_version for rollout in rollouts] == [3, 3, 3], "the oldest"


def test_tokens_of_a_reply_are_marked_and_have_no_log_probability():
    generator, _, _ = talk(CALLS)
    (rollout,) = generator.generate([question("p")], SAMPLING)
    assert "".join(map(chr, rollout.token_ids)) == "7*6!42so 42*"
    assert rollout.is_sampled == (True,) * 4 + (False,) * 2 + (True,) * 6
    assert rollout.sampled_logprobs == (-1.0,) * 4 + (0.0,) * 2 + (-2.0,) * 6
    assert rollout.num_sampled == 10
    shown = Answer.of(rollout, 3, is_right=True)
    assert shown == Answer(3, "p", "7*6!\u00ab42\u00bbso 42", "", True)


def test_nothing_is_trained_on_or_counted_that_the_model_did_not_write():
    generator, _, replier = talk(CALLS)
    prompts = [question("p"), question("q", 1)]
    groups = collect(prompts, generator, replier, SAMPLING, num_samples=1)
    batch = rollout_batch(groups, torch.tensor([[2.0], [3.0]]))
    own = [0] + [1] * 4 + [0] * 2 + [1] * 6 + [0] + [1] * 3
    assert batch.loss_mask_N.int().tolist() == own
    assert batch.advantages_N.tolist() == [2.0 * o for o in own[:13]] + [3.0 * o for o in own[13:]]
    assert (batch.sampled_logprobs_N == 0).tolist() == [not o for o in own]
    assert (batch.num_loss_tokens, batch.lengths_B.tolist()) == (13, [13, 4])
    assert lengths_of(groups).tolist() == [[10], [3]]
    metrics = rollout_metrics(groups)
    assert metrics["avg_turns_per_sample"].value == 1.5
    assert metrics["mean_gen_tokens_per_sample"].value == 6.5
    left_out = rollout_batch(groups, torch.ones(2, 1), torch.tensor([[False], [True]]))
    assert (left_out.num_loss_tokens, left_out.num_sequences) == (3, 1)


def test_a_reply_after_the_end_of_a_message_is_the_next_message():
    hints = {"hm": "hint"}
    generator, _, _ = talk({"p": ["hm*", "ah*"]}, hints.get)
    (rollout,) = generator.generate([question("p")], SAMPLING)
    assert "".join(map(chr, rollout.token_ids)) == "hm*[hint]ah*"
    assert rollout.text == "hm\nhint\nah"
    assert Answer.of(rollout, 1, is_right=False).answer == "hm\n\u00abhint\u00bb\nah"


def test_the_dice_of_a_turn_are_its_own_and_do_not_depend_on_who_is_still_open():
    prompts = [question("q", 1), question("p"), question("p")]
    together, talker, _ = talk(CALLS | {"q": ["1*"]})
    together.generate(prompts, SAMPLING)
    assert [samples for _, _, samples in talker.calls] == [[0, 0, 1], [0, 1]]
    seeds = [seed for _, seed, _ in talker.calls]
    assert seeds[0] == SAMPLING.seed, "the first turn is that of a run without replies"
    assert len(set(seeds)) == 2

    alone, other, _ = talk(CALLS)
    alone.generate([question("p")], SAMPLING, [1])
    assert [(seed, samples) for _, seed, samples in other.calls] == [(s, [1]) for s in seeds]
    later, other, _ = talk(CALLS)
    later.generate([question("p")], replace(SAMPLING, seed=6))
    assert not {seed for _, seed, _ in other.calls} & set(seeds)


def test_the_last_turn_gets_no_reply():
    generator, talker, replier = talk({"p": ["1!", "2!", "3!"]}, max_turns=2)
    (rollout,) = generator.generate([question("p")], SAMPLING)
    assert (rollout.text, rollout.finish_reason) == ("1!422!", "stop")
    assert len(talker.calls) == 2 and len(replier.asked) == 1


def test_an_answer_that_was_cut_off_ends_its_rollout():
    generator, _, replier = talk({"p": ["too long to end!"], "q": ["1!", "never ending*"]})
    rollouts = generator.generate([question("p"), question("q", 1)], SAMPLING)
    assert said(rollouts) == ["too long", "1!42never en"]
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}
    assert replier.asked == [["1!"]]


@pytest.mark.parametrize(("max_length", "is_heard"), [(6, True), (5, False)])
def test_a_reply_after_which_nothing_fits_is_not_given(max_length, is_heard):
    generator, _, replier = talk({"p": ["1!", "*"]}, max_length=max_length)
    groups = collect([question("p")], generator, replier, SAMPLING, num_samples=1)
    (rollout,) = groups[0].rollouts
    assert rollout.text == ("1!42" if is_heard else "1!")
    assert truncated(groups).tolist() == [[not is_heard]]
    assert rollout.is_sampled[-1], "what nobody goes on with is no part of a rollout"


@pytest.mark.parametrize(
    ("replies", "what"),
    [
        ([], "FakeReplier gave 0 replies to 1 rollouts"),
        ([7], r"FakeReplier replied 7, expected a text or None, to '1!' after the prompt 'p'"),
    ],
)
def test_what_is_no_reply_ends_the_run_with_its_sample(replies, what):
    generator, _, replier = talk({"p": ["1!"]})
    replier.reply = lambda rollouts: replies
    with pytest.raises(DataError, match=what):
        generator.generate([question("p")], SAMPLING)


def test_an_environment_that_writes_no_replies_lets_every_answer_be_the_last():
    class Judge(Environment):
        def score(self, rollouts):
            return [1.0] * len(rollouts)

    talker = FakeTalker(CALLS)
    generator = ConversingGenerator(talker, Judge(), FakeReplier(calls), max_turns=9, max_length=99)
    assert said(generator.generate([question("p")], SAMPLING)) == ["7*6!"]


def test_a_validation_is_of_conversations_too():
    generator, _, replier = talk(CALLS)
    found = evaluate(None, generator, replier, [question("p"), question("q", 1)], SAMPLING)
    assert said(found.rollouts) == ["7*6!42so 42", "no"]
    metrics = {name: metric.value for name, metric in found.metrics().items()}
    assert metrics == {"accuracy": 6.5, "answer_tokens": 6.5, "turns": 1.5, "truncated": 0.0}
