"""Where the rollouts of a run come from: on time or ahead, kept in checkpoints, and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_like.algorithms.grpo import Check
from nemo_like.backends.agreement import CURE, ERROR, disagreement
from nemo_like.checkpoint import rollouts
from nemo_like.config.generation import MismatchConfig
from nemo_like.config.grpo import GRPOTree
from nemo_like.errors import CheckpointError, MismatchError
from nemo_like.interfaces import Environment, Generator, Policy, RolloutSource
from nemo_like.rollout.ahead import RolloutsAhead
from nemo_like.rollout.source import Drawing, PromptStream, RolloutsOnTime
from nemo_like.types import SamplingParams, StepStats


@dataclass(frozen=True)
class RunRollouts:
    """The rollouts of a run as its algorithm, its checkpoints and its validation see them."""

    source: RolloutSource
    ahead: RolloutsAhead | None = None

    @property
    def agreement(self) -> str:
        """The metric that says how far engine and policy are apart under the same weights."""
        return ERROR if self.ahead is None else "probe_mult_prob_error"

    def settle(self) -> None:
        """Returns when the engines are free."""
        if self.ahead is not None:
            self.ahead.settle()

    def save(self, folder: Path) -> None:
        """Write what is drawn ahead into a checkpoint, once it is."""
        if self.ahead is not None:
            rollouts.write(folder, self.ahead.pending())

    def load(self, folder: Path) -> None:
        """Take what `save` wrote.

        Raises:
            CheckpointError: it is of a run that draws ahead, and this one does not, or not so far.
        """
        pending = rollouts.read(folder)
        if self.ahead is not None:
            self.ahead.restore(pending)
        elif pending:
            raise CheckpointError(
                f"{folder} holds rollouts that were drawn ahead, and this run draws them on time: "
                "to continue, set grpo.async_grpo.enabled=true again"
            )


def build_rollouts(
    tree: GRPOTree,
    policy: Policy,
    generator: Generator,
    environment: Environment,
    prompts: PromptStream,
    sampling: SamplingParams,
    stack: ExitStack,
) -> RunRollouts:
    """The rollouts of this run; drawing ahead is ended by the stack."""
    grpo = tree.grpo
    drawing = Drawing(
        prompts,
        generator,
        environment,
        sampling,
        num_prompts=round(grpo.num_prompts_per_step * grpo.batch_multiplier),
        num_samples=grpo.num_generations_per_prompt,
    )
    if not grpo.async_grpo.enabled:
        return RunRollouts(RolloutsOnTime(drawing, policy))
    ahead = RolloutsAhead(drawing, policy, max_age_steps=grpo.async_grpo.max_trajectory_age_steps)
    stack.callback(ahead.close)
    return RunRollouts(ahead, ahead)


def sampling_of(tree: GRPOTree, tokenizer: Any) -> SamplingParams:
    """How this run draws tokens to train on."""
    generation = tree.policy.generation
    stops = generation.stop_token_ids
    return SamplingParams(
        max_new_tokens=tree.policy.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        stop_token_ids=(tokenizer.eos_token_id,) if stops is None else stops,
        stop_strings=generation.stop_strings,
        seed=tree.grpo.seed,
    )


def agreement_check(bound: MismatchConfig, metric: str, say: Callable[[str], object]) -> Check:
    """What is asked after every step: whether engine and policy compute the same.

    The check raises a MismatchError if they do not, and `mismatch.action` is `stop`; of rollouts
    drawn on time the policy has refused the step itself by then. A step without the metric sent no
    weights; one that was skipped since it is not finite is no disagreement.
    """

    def check(step: int, stats: StepStats) -> None:
        limit = bound.max_token_mult_prob_error
        found = stats.metrics[metric].value if metric in stats.metrics else 0.0
        if found <= limit or (stats.skipped and not math.isfinite(found)):
            return
        text = disagreement(step, metric, found, limit)
        if bound.action == "stop":
            raise MismatchError(f"{text}. {CURE}")
        say(text)

    return check
