"""The records that travel between algorithm, backend and engine.

Shape legend (suffixes of tensor names, used in the whole package):
    P prompts, G samples of one prompt, B sequences, T tokens of one sequence, N tokens of all
    sequences laid end to end, V vocabulary, D model width.

Four log-probabilities, never mixed: `sampled_` (from the rollout engine), `old_` (the policy at the
start of the step), `ref_` (the frozen start weights), and bare `logprobs` (with gradient).

Batches are ragged: sequences lie end to end, without padding. How a backend pads or packs them into
rows is its own affair, so no loss can depend on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "min", "max", "last"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A value that knows how it combines with others of its name.

    `weight` is what a mean is weighted with (tokens, sequences, ...); other reductions ignore it.
    """

    value: float
    reduction: Reduction = "last"
    weight: float = 1.0


Metrics = dict[str, Metric]


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised training sequence; `loss_mask[t]` says whether token t is a target.

    Example: "2+2=" answered "4<eos>" is `token_ids=(17, 10, 17, 28, 19, 0)` with
    `loss_mask=(False, False, False, False, True, True)`.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an engine completes.

    `index` tells the prompts of a run apart, `answer` is what the environment `env_name` expects.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    answer: str
    env_name: str = ""


Span = tuple[int, int]
"""The first place, and the one after the last."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Where an environment wrote into a rollout: places in its token ids, and in its text."""

    tokens: Span
    characters: Span


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of a prompt, in one turn, or in several with an environment's replies between.

    `token_ids` and `sampled_logprobs` (nats) hold all that follows the prompt, end-of-sequence
    tokens included. Tokens at the places of `replies` are the environment's: nobody sampled them,
    their log-probability is 0 here, and no policy trains on them. `weights_version` is the number
    of the weight update that the engine had applied, the oldest one of all turns.

    Example: "<calc>6*7</calc>", to which "42" was replied, and then "Answer: 42", as
    `text="<calc>6*7</calc>42Answer: 42"`; if each of the three parts were one token,
    `replies=(Reply(tokens=(1, 2), characters=(16, 18)),)`.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    sampled_logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    weights_version: int
    replies: tuple[Reply, ...] = ()

    @property
    def num_turns(self) -> int:
        """How often the model answered."""
        return len(self.replies) + 1

    @property
    def latest(self) -> str:
        """The text of the model's latest answer."""
        return self.text[self.replies[-1].characters[1] :] if self.replies else self.text

    @property
    def num_sampled(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.is_sampled)

    @property
    def is_sampled(self) -> tuple[bool, ...]:
        """Of each token, whether the model wrote it."""
        is_sampled = [True] * len(self.token_ids)
        for start, stop in (reply.tokens for reply in self.replies):
            is_sampled[start:stop] = [False] * (stop - start)
        return tuple(is_sampled)


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt in one step, and what each of them is worth."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Drawn:
    """What a step trains on, and what there is to tell of how it came to be."""

    groups: list[Group]
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class DrawnAhead:
    """What a run holds for a later step; `groups` is None where its prompts alone are chosen.

    `weights_step` is the number of steps that the weights had been trained for that drew.
    """

    step: int
    weights_step: int
    prompts: tuple[Prompt, ...]
    groups: tuple[Group, ...] | None


def sample_numbers(prompts: Sequence[Prompt]) -> list[int]:
    """How often the prompt at each place was in the list before that place.

    It tells the samples of a prompt apart: a rollout is a function of weights, seed, prompt index
    and this number.
    """
    seen: Counter[int] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(seen[prompt.index])
        seen[prompt.index] += 1
    return numbers


@dataclass(frozen=True)
class SamplingParams:
    """How an engine picks tokens; `temperature=0` is greedy.

    A completion ends with the first token of `stop_token_ids`, or the first that completes one of
    the `stop_strings` in its text; token and string belong to it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainBatch:
    """Sequences laid end to end, and the denominators of the whole optimizer step.

    `num_loss_tokens` and `num_sequences` count the *global* batch, whatever part of it this object
    holds: that is why micro-batches, packing and the number of data-parallel ranks never change a
    loss.

    Example, of two sequences "ab" -> "c" and "d" -> "ef":
        token_ids_N = [a b c d e f], loss_mask_N = [0 0 1 0 1 1], lengths_B = [3 3],
        num_loss_tokens = 3

    Batches made of rollouts carry advantages and log-probabilities (nats) besides, 0 on the tokens
    of prompts. A sequence that was taken out has a mask without a token, and is not counted.
    `old_logprobs_N` is None where a step updates the weights once: old is then what the model
    itself computes, without its gradient.
    """

    token_ids_N: Tensor
    loss_mask_N: Tensor
    lengths_B: Tensor
    num_loss_tokens: int
    num_sequences: int
    advantages_N: Tensor | None = None
    old_logprobs_N: Tensor | None = None
    sampled_logprobs_N: Tensor | None = None
    ref_logprobs_N: Tensor | None = None

    @classmethod
    def of(cls, examples: Sequence[Example]) -> TrainBatch:
        """The batch that holds exactly these examples, in this order."""
        mask_N = torch.tensor([m for e in examples for m in e.loss_mask], dtype=torch.bool)
        lengths_B = torch.tensor([len(e.token_ids) for e in examples], dtype=torch.int64)
        assert not mask_N[lengths_B.cumsum(0) - lengths_B].any(), "nothing predicts a first token"
        return cls(
            token_ids_N=torch.tensor([t for e in examples for t in e.token_ids], dtype=torch.int64),
            loss_mask_N=mask_N,
            lengths_B=lengths_B,
            num_loss_tokens=int(mask_N.sum()),
            num_sequences=len(examples),
        )

    def __len__(self) -> int:
        return len(self.lengths_B)

    def token_index(self, rows: Sequence[int]) -> Tensor:
        """The positions in N of all tokens of these sequences, in this order. Shapes: [n]."""
        ends = self.lengths_B.cumsum(0).tolist()
        spans = [torch.arange(ends[r] - int(self.lengths_B[r]), ends[r]) for r in rows]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    def select(self, rows: Sequence[int]) -> TrainBatch:
        """These sequences, in this order, with the global denominators unchanged."""
        index = self.token_index(rows)
        per_token: dict[str, Any] = {
            name: value[index] for name, value in self._tensors() if name.endswith("_N")
        }
        return dataclasses.replace(self, lengths_B=self.lengths_B[list(rows)], **per_token)

    def split(self, parts: int) -> list[TrainBatch]:
        """As many batches of consecutive sequences, each an optimizer step with its own counts.

        They are as equal as can be, and fewer where there are fewer sequences than `parts`.
        """
        rows = torch.arange(len(self)).tensor_split(min(parts, len(self)))
        return [self.select(part.tolist()).recounted() for part in rows]

    def recounted(self) -> TrainBatch:
        """The same with the denominators of what is here: a whole optimizer step by itself."""
        masks = torch.split(self.loss_mask_N, self.lengths_B.tolist())
        return dataclasses.replace(
            self,
            num_loss_tokens=int(self.loss_mask_N.sum()),
            num_sequences=sum(bool(mask.any()) for mask in masks),
        )

    def to(self, device: torch.device) -> TrainBatch:
        """The same batch on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in self._tensors()
        }
        return dataclasses.replace(self, **moved)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return [(name, value) for name, value in named if isinstance(value, Tensor)]


Row = tuple[int, ...]
"""Sequences (by index in a shard) that share one row of a model input; several when packed."""
MicroBatch = tuple[Row, ...]
"""Rows that go through the model together."""


@dataclass(frozen=True)
class Shard:
    """What one data-parallel rank gets of a batch: its sequences, and which share a forward pass.

    Every rank gets the same number of micro-batches, because every forward pass is a collective.
    A rank with nothing left to do gets an empty micro-batch `()`: it takes part with a dummy row.
    """

    batch: TrainBatch
    micro_batches: tuple[MicroBatch, ...]


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did.

    `phases` are seconds of wall time by name; they sum to the step's time. `skipped` says that the
    weights are as they were, because a loss or a gradient was not finite.
    """

    metrics: Metrics
    phases: dict[str, float] = field(default_factory=dict)
    skipped: bool = False


_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class PolicyFacts:
    """What a policy tells about itself, the same on every rank.

    `model` is the content of the model's config.json. `owners` has one record per trainable
    parameter: name, shape, optimizer, reason. `outlook` says what to expect of the optimizer, in
    words by title. `num_parameters` counts tied parameters once.
    """

    model: dict[str, Any]
    owners: list[dict[str, Any]]
    num_parameters: int
    device: str
    threads: int
    world_size: int
    outlook: dict[str, str] = field(default_factory=dict)

    @property
    def num_multiplied_parameters(self) -> float:
        """The parameters that a token is multiplied with: what its FLOPs come from.

        An input embedding that is no output head too is only looked up, and of the experts of a
        layer a token has but some.
        """
        of_experts = self.model.get("num_experts_per_tok", 1) / self.model.get("num_experts", 1)
        total = 0.0
        for owner in self.owners:
            if owner["name"] == _EMBEDDING and not self.model.get("tie_word_embeddings"):
                continue
            share = of_experts if ".experts." in owner["name"] else 1.0
            total += share * math.prod(owner["shape"])
        return total
