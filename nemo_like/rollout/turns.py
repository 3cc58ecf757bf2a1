"""Rollouts of several turns: an engine answers, an environment replies, the engine goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from nemo_like.errors import DataError
from nemo_like.interfaces import Environment, Generator, WeightSource
from nemo_like.rollout.sampling import turn_seed
from nemo_like.types import Prompt, Reply, Rollout, SamplingParams, sample_numbers


class ReplyEncoder(Protocol):
    """What turns an environment's words into tokens; the tokenizer's owner has it."""

    def reply_ids(self, text: str, *, ended_by: int | None) -> Sequence[int]:
        """The tokens that stand between two answers of the model.

        `ended_by` is the token that the model ended its message with, to which this is the next
        message; None is a reply that goes on within the model's own message.
        """
        ...


class ConversingGenerator:
    """A `Generator` whose rollouts go on for as long as the environment replies.

    A rollout is complete when the environment replies None, when the model has answered `max_turns`
    times, when an answer was cut off by its own limit (`max_new_tokens` is of one turn), or when no
    token of another answer would fit (`finish_reason` is then `length` too).

    All that is still open goes through a turn as one call of the generator and one of the
    environment. Each turn has its own dice, a function of (seed, turn, prompt, number of the
    sample); so a rollout does not depend on which others are still open. Tokens of earlier turns
    stay as they were sampled.

    Args:
        generator: What answers; to be closed by its owner, like the environment.
        environment: What replies.
        encoder: Makes tokens of replies.
        max_turns: The most answers of the model in one rollout.
        max_length: The most tokens of a prompt and its rollout together.
    """

    def __init__(
        self,
        generator: Generator,
        environment: Environment,
        encoder: ReplyEncoder,
        *,
        max_turns: int,
        max_length: int,
    ):
        self._generator, self._environment, self._encoder = generator, environment, encoder
        self._max_turns, self._max_length = max_turns, max_length

    def sync(self, policy: WeightSource) -> None:
        """Take the policy's weights of now."""
        self._generator.sync(policy)

    def close(self) -> None:
        """Close the generator."""
        self._generator.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        samples: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in the order of the prompts.

        Raises:
            DataError: the environment gives too few replies or too many, or one that is no text.
        """
        numbers = sample_numbers(prompts) if samples is None else samples
        rollouts = list(self._generator.generate(prompts, sampling, numbers))
        places = list(range(len(rollouts)))
        for turn in range(1, self._max_turns):
            places = self._hear(rollouts, places, sampling)
            if not places:
                break
            answers = self._generator.generate(
                [_prompt_so_far(rollouts[place]) for place in places],
                replace(sampling, seed=turn_seed(sampling.seed, turn)),
                [numbers[place] for place in places],
            )
            for place, answer in zip(places, answers, strict=True):
                rollouts[place] = _joined(rollouts[place], answer)
        return rollouts

    def _hear(
        self, rollouts: list[Rollout], places: Sequence[int], sampling: SamplingParams
    ) -> list[int]:
        """The places of rollouts that were replied to; the replies are written into them."""
        asked = [place for place in places if rollouts[place].finish_reason == "stop"]
        if not asked:
            return []
        replies = self._environment.reply([rollouts[place] for place in asked])
        _check(replies, [rollouts[place] for place in asked], self._environment)
        heard = []
        for place, reply in zip(asked, replies, strict=True):
            if reply is None:
                continue
            longer = self._with_reply(rollouts[place], reply, sampling)
            if len(longer.prompt.token_ids) + len(longer.token_ids) < self._max_length:
                rollouts[place] = longer
                heard.append(place)
            else:
                rollouts[place] = replace(rollouts[place], finish_reason="length")
        return heard

    def _with_reply(self, rollout: Rollout, reply: str, sampling: SamplingParams) -> Rollout:
        last = rollout.token_ids[-1]
        is_message = last in sampling.stop_token_ids
        ids = self._encoder.reply_ids(reply, ended_by=last if is_message else None)
        before, written = len(rollout.token_ids), len(rollout.text)
        text = f"\n{reply}\n" if is_message else reply
        place = Reply((before, before + len(ids)), (written, written + len(text)))
        return replace(
            rollout,
            token_ids=(*rollout.token_ids, *ids),
            sampled_logprobs=rollout.sampled_logprobs + (0.0,) * len(ids),
            text=rollout.text + text,
            replies=(*rollout.replies, place),
        )


def _prompt_so_far(rollout: Rollout) -> Prompt:
    return replace(rollout.prompt, token_ids=rollout.prompt.token_ids + rollout.token_ids)


def _joined(rollout: Rollout, answer: Rollout) -> Rollout:
    return replace(
        rollout,
        token_ids=rollout.token_ids + answer.token_ids,
        sampled_logprobs=rollout.sampled_logprobs + answer.sampled_logprobs,
        text=rollout.text + answer.text,
        finish_reason=answer.finish_reason,
        weights_version=min(rollout.weights_version, answer.weights_version),
    )


def _check(replies: Sequence[object], rollouts: Sequence[Rollout], replier: Environment) -> None:
    name = type(replier).__name__
    if len(replies) != len(rollouts):
        raise DataError(f"{name} gave {len(replies)} replies to {len(rollouts)} rollouts")
    for reply, rollout in zip(replies, rollouts, strict=True):
        if reply is not None and not isinstance(reply, str):
            raise DataError(
                f"{name} replied {reply!r:.200}, expected a text or None, to "
                f"{rollout.text[:200]!r} after the prompt {rollout.prompt.text[:200]!r}"
            )
