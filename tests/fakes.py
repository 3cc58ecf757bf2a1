"""Plain objects that stand in for the world: a policy without a model, a journal without a disk."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from nemo_like.checkpoint import rng
from nemo_like.checkpoint.layout import MODEL, OPTIMIZER
from nemo_like.checkpoint.store import StateWriter
from nemo_like.types import Example, Metric, PolicyFacts, StepStats


class FakePolicy:
    """Its loss halves with every step; it remembers what it was asked."""

    def __init__(self):
        self.batches = []
        self.logprob = -1.0

    def begin(self, total_steps):
        return PolicyFacts({}, [], 0, "cpu", 1, 1)

    def logprobs(self, batch):
        return torch.where(batch.loss_mask_N, self.logprob, 0.0)

    def train_step(self, batch, loss):
        share, metrics = loss(self.logprobs(batch), batch)
        self.batches.append(batch)
        self.logprob /= 2
        return StepStats(metrics | {"loss": Metric(float(share), "sum")})


class FakeStream:
    """Counts what was taken; example n is the tokens (n, n + 1)."""

    def __init__(self):
        self.taken = 0

    def take(self, n):
        first, self.taken = self.taken, self.taken + n
        return [Example((i, i + 1), (False, True)) for i in range(first, self.taken)]


class FakeJournal:
    """Remembers everything in order; `stop_after` plays the signal that ends a run."""

    def __init__(self, last_step, *, first_step=1, stop_after=None):
        self.first_step = first_step
        self.last_step = last_step
        self.stop_after = stop_after
        self.events = []

    def steps(self):
        for step in range(self.first_step, self.last_step + 1):
            yield step
            self.events.append(("end", step))
            if step == self.stop_after:
                return

    def phase(self, name):
        return nullcontext()

    def record(self, step, batch, stats):
        self.events.append(("train", step, stats.metrics["loss"].value))

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
