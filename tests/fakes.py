"""Plain objects that stand in for the world: a policy without a model, a journal without a disk."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from nemo_like.checkpoint import rng
from nemo_like.checkpoint.layout import MODEL, OPTIMIZER
from nemo_like.checkpoint.store import StateWriter
from nemo_like.interfaces import Environment
from nemo_like.types import Example, Metric, PolicyFacts, Prompt, Rollout, StepStats


class FakePolicy:
    """Its loss halves with every step; it remembers what it was asked."""

    def __init__(self):
        self.batches, self.steps = [], []
        self.logprob = -1.0

    def begin(self, total_steps):
        return PolicyFacts({}, [], 0, "cpu", 1, 1)

    def logprobs(self, batch, reference=False):
        return torch.where(batch.loss_mask_N, -1.0 if reference else self.logprob, 0.0)

    def train_step(self, batch, loss, *, step=None):
        share, metrics = loss(self.logprobs(batch), batch)
        self.batches.append(batch)
        self.steps.append(step)
        self.logprob /= 2
        return StepStats(metrics | {"loss": Metric(float(share), "sum")})


class FakeStream:
    """Counts what was taken; example n is the tokens (n, n + 1)."""

    def __init__(self):
        self.taken = 0

    def take(self, n):
        first, self.taken = self.taken, self.taken + n
        return [Example((i, i + 1), (False, True)) for i in range(first, self.taken)]


class FakePrompts:
    """Prompt n is the token n alone."""

    def __init__(self):
        self.taken = 0

    def take(self, n):
        first, self.taken = self.taken, self.taken + n
        return [Prompt(i, (i,), str(i), str(i)) for i in range(first, self.taken)]


class FakeGenerator:
    """Sample g of a prompt in a call is g + 1 tokens long; it remembers dice and weights."""

    def __init__(self, longest=99):
        self.longest = longest
        self.synced_at = []
        self.seeds = []

    def sync(self, policy):
        self.synced_at.append(policy.logprob)

    def generate(self, prompts, sampling, samples=None):
        self.seeds.append(sampling.seed)
        seen, rollouts = {}, []
        for prompt in prompts:
            sample = seen[prompt.index] = seen.get(prompt.index, -1) + 1
            length = min(sample + 1, self.longest)
            rollouts.append(
                Rollout(
                    prompt,
                    token_ids=tuple(range(length)),
                    sampled_logprobs=(self.synced_at[-1],) * length,
                    text=f"{prompt.index}.{sample}",
                    finish_reason="length" if length == self.longest else "stop",
                    weights_version=len(self.synced_at),
                )
            )
        return rollouts

    def close(self):
        pass


class FakeEnvironment(Environment):
    """A rollout's reward is what `reward` makes of the numbers of its prompt and its sample."""

    def __init__(self, reward):
        self.reward = reward

    def score(self, rollouts):
        return [self.reward(*map(int, rollout.text.split("."))) for rollout in rollouts]


class FakeJournal:
    """Remembers everything in order; `stop_after` plays the signal that ends a run."""

    def __init__(self, last_step, *, first_step=1, stop_after=None):
        self.first_step = first_step
        self.last_step = last_step
        self.stop_after = stop_after
        self.stopped = False
        self.events = []

    def stop(self, reason):
        self.events.append(("stop", reason))
        self.stopped = True

    def steps(self):
        for step in range(self.first_step, self.last_step + 1):
            yield step
            if self.stopped:
                return
            self.events.append(("end", step))
            if step == self.stop_after:
                return

    def phase(self, name):
        return nullcontext()

    def beside(self, name, seconds):
        pass

    def record(self, step, batch, stats):
        self.events.append(("train", step, stats.metrics["loss"].value))
        self.metrics = {name: metric.value for name, metric in stats.metrics.items()}

    def record_validation(self, step, metrics):
        self.events.append(("validation", step))


class SavingPolicy(FakePolicy):
    """Writes one real tensor; `polls` is how often a save says that it is not finished yet."""

    def __init__(self, *, polls=0, fails=None):
        super().__init__()
        self.polls = polls
        self.fails = fails
        self.pending = 0
        self.loaded = None

    def save(self, folder, *, with_optimizer=True):
        state = {"w": torch.full((2,), self.logprob)}
        with StateWriter(asynchronous=False) as writer:
            writer.save(folder, {MODEL: state} | ({OPTIMIZER: state} if with_optimizer else {}))
        rng.save(folder, rank=0, world_size=1)
        self.pending = self.polls

    def save_finished(self):
        if self.fails is not None:
            raise self.fails
        self.pending -= 1
        return self.pending < 0

    def load(self, folder):
        self.loaded = folder

    def export_weights(self):
        yield "w", torch.ones(2)


class FakeSink:
    """Remembers what it was told, and what lay on the disk then."""

    def __init__(self, seen=lambda: None):
        self.seen = seen
        self.lines = []

    def log(self, step, values):
        self.lines.append((step, values, self.seen()))

    def close(self):
        pass


class FakeTalker:
    """A generator that says what `script` has for a prompt's text, turn by turn.

    A character is a token, of which the character's code is the number; `*` ends a message. It
    remembers its calls.
    """

    END = ord("*")

    def __init__(self, script):
        self.script = script
        self.calls = []

    def sync(self, policy):
        pass

    def generate(self, prompts, sampling, samples=None):
        self.calls.append((list(prompts), sampling.seed, list(samples)))
        rollouts = []
        for prompt in prompts:
            turn = len(self.calls) - 1
            said = self.script[prompt.text][turn][: sampling.max_new_tokens]
            is_cut = not said.endswith(("*", "!"))
            rollouts.append(
                Rollout(
                    prompt,
                    token_ids=tuple(map(ord, said)),
                    sampled_logprobs=(-1.0 - turn,) * len(said),
                    text=said.rstrip("*"),
                    finish_reason="length" if is_cut else "stop",
                    weights_version=turn + 3,
                )
            )
        return rollouts

    def close(self):
        pass


class FakeReplier(Environment):
    """Replies by `answer`, a function of the text so far; every rollout is worth its length."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def reply(self, rollouts):
        self.asked.append([rollout.text for rollout in rollouts])
        return [self.answer(rollout.text) for rollout in rollouts]

    def score(self, rollouts):
        return [float(len(rollout.text)) for rollout in rollouts]

    def reply_ids(self, text, *, ended_by):
        """As an encoder: in brackets after a message that ended."""
        return list(map(ord, text if ended_by is None else f"[{text}]"))
