"""Rollouts that are drawn while earlier steps train, by weights that are some steps old."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch

from nemo_like.errors import CheckpointError
from nemo_like.interfaces import Journal, Policy
from nemo_like.rollout.collect import rollout_batch
from nemo_like.rollout.source import Drawing, dice
from nemo_like.types import Drawn, DrawnAhead, Group, Metric, Metrics, Prompt

PROBE_PROMPTS = 8
PROBE_TOKENS = 16
"""A probe is short, since nothing trains meanwhile."""


@dataclass(frozen=True)
class _Timed:
    """Groups, and the seconds that it took to draw and judge them."""

    groups: list[Group]
    took_s: float


@dataclass(frozen=True)
class _Job:
    """The rollouts of a later step, perhaps still being drawn.

    `weights_step` is how many steps had been trained when the engines took the weights.
    """

    step: int
    weights_step: int
    prompts: tuple[Prompt, ...]
    result: Future[_Timed]


class RolloutsAhead:
    """Draws the rollouts of the next `max_age_steps` steps in the background, while a step trains.

    Whenever nothing is left ahead, the engines take the weights of the step that is about to train,
    and begin with the rollouts of the steps after it; that is before each step with a greatest age
    of 1. At the start of a run they draw those of its first step besides. So rollouts are never
    older than the greatest age, no batch is of two versions of the weights, engines take weights
    only between batches and while the policy does nothing else, and which version draws for which
    step is a function of the steps' numbers, never of who was faster.

    Prompts are taken from the data where the steps are, so its position is a function of the step
    too. An error in the background is raised by the step that needs what it kept from being drawn.
    """

    def __init__(self, drawing: Drawing, policy: Policy, *, max_age_steps: int) -> None:
        self._drawing = drawing
        self._policy = policy
        self._max_age_steps = max_age_steps
        self._ahead: deque[_Job] = deque()
        self._chosen: dict[int, tuple[Prompt, ...]] = {}  # prompts of steps that are to be redrawn
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="rollouts")

    def next(self, step: int, journal: Journal, batch: int = 0) -> Drawn:
        """The rollouts that a step trains on, whose successors are begun when it returns."""
        assert batch == 0, "a rule of the config: no dynamic sampling"
        metrics: Metrics = {}
        if not self._ahead:
            metrics |= self._begin(step, step, journal)
        job = self._ahead.popleft()
        assert job.step == step, f"rollouts of step {job.step} are next, not of step {step}"
        waiting_since = time.perf_counter()
        with journal.phase("rollout"):
            drawn = job.result.result()
        waited_s = time.perf_counter() - waiting_since
        journal.beside("rollout", max(0.0, drawn.took_s - waited_s))
        if not self._ahead:
            metrics |= self._begin(step, step + 1, journal)
        age = Metric(step - 1 - job.weights_step)
        return Drawn(drawn.groups, {"rollout_age_steps": age} | metrics)

    def settle(self) -> None:
        """Returns when nothing is being drawn, whether that went well or not."""
        wait([job.result for job in self._ahead])

    def pending(self) -> list[DrawnAhead]:
        """What is there for later steps once all is drawn; after a failure only their prompts."""
        self.settle()
        found: list[DrawnAhead] = []
        has_failed = False
        for job in self._ahead:
            has_failed = has_failed or job.result.exception() is not None
            groups = None if has_failed else tuple(job.result.result().groups)
            found.append(DrawnAhead(job.step, job.weights_step, job.prompts, groups))
        # Prompts of a failed drawing that this run took over, and has not come to yet.
        chosen = sorted(self._chosen.items())
        return found + [DrawnAhead(step, step - 1, prompts, None) for step, prompts in chosen]

    def restore(self, pending: Sequence[DrawnAhead]) -> None:
        """Go on with what `pending` gave; what was not drawn then is drawn by the weights of now.

        Raises:
            CheckpointError: some of it would be older than is allowed now.
        """
        for one in pending:
            age = one.step - 1 - one.weights_step
            if age > self._max_age_steps:
                raise CheckpointError(
                    f"the checkpoint holds rollouts for step {one.step} that would be {age} steps "
                    f"old, expected at most grpo.async_grpo.max_trajectory_age_steps="
                    f"{self._max_age_steps}: set it to {age} at least"
                )
            if one.groups is None:
                self._chosen[one.step] = one.prompts
                continue
            done: Future[_Timed] = Future()
            done.set_result(_Timed(list(one.groups), 0.0))
            self._ahead.append(_Job(one.step, one.weights_step, one.prompts, done))

    def close(self) -> None:
        """Ends the engines, which ends what is being drawn, and waits for that; safe twice."""
        self._lane.shutdown(wait=False, cancel_futures=True)
        self._drawing.generator.close()
        self._lane.shutdown(wait=True)

    def _begin(self, step: int, first: int, journal: Journal) -> Metrics:
        """Send the weights of this step's start, and let them draw for the steps from `first` on.

        The metrics say how far the engines are from the policy now, before they fall behind.
        """
        steps = range(first, min(step + self._max_age_steps, journal.last_step) + 1)
        if not steps:
            return {}
        with journal.phase("sync"):
            self._drawing.generator.sync(self._policy)
        chosen = [
            self._chosen.pop(n) if n in self._chosen else tuple(self._drawing.ask()) for n in steps
        ]
        with journal.phase("probe"):
            agreement = _probe(self._policy, self._drawing, chosen[0], steps[0])
        for number, prompts in zip(steps, chosen, strict=True):
            drawing = self._lane.submit(self._draw, prompts, number)
            self._ahead.append(_Job(number, step - 1, prompts, drawing))
        return agreement

    def _draw(self, prompts: Sequence[Prompt], step: int) -> _Timed:
        began = time.perf_counter()
        groups = self._drawing.draw(prompts, step)
        return _Timed(groups, time.perf_counter() - began)


def _probe(policy: Policy, drawing: Drawing, prompts: Sequence[Prompt], step: int) -> Metrics:
    """`probe_mult_prob_error`: mean over a few fresh tokens of exp |log p(engine) - log p(policy)|.

    To be asked when the engines have just taken the policy's weights. On rollouts of older weights
    the same number would be larger because the policy has learned.
    """
    sampling = dice(drawing.sampling, step)
    sampling = replace(sampling, max_new_tokens=min(PROBE_TOKENS, sampling.max_new_tokens))
    rollouts = drawing.generator.generate(prompts[:PROBE_PROMPTS], sampling)
    groups = [Group(rollout.prompt, (rollout,), (0.0,)) for rollout in rollouts]
    batch = rollout_batch(groups, torch.zeros(len(groups), 1))
    assert batch.sampled_logprobs_N is not None
    gap_N = (policy.logprobs(batch) - batch.sampled_logprobs_N).double()
    error_N = gap_N[batch.loss_mask_N].abs().exp()
    return {"probe_mult_prob_error": Metric(float(error_N.mean()), "mean", len(error_N))}
