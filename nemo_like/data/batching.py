"""Which sequences share a forward pass, and which data-parallel rank takes them.

Every rank gets the same number of micro-batches, because every forward pass is a collective, and
about as many tokens as the others at each of them. All of it is arithmetic on lengths: one input,
one plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nemo_like.config.policy import PolicyConfig
from nemo_like.data.packing import ALGORITHMS
from nemo_like.errors import DataError
from nemo_like.types import MicroBatch, Shard, TrainBatch

Group = list[int]
"""Sequences of one micro-batch, before they are laid into rows."""


@dataclass(frozen=True)
class Batching:
    """How sequences become micro-batches.

    `plain`: up to `micro_batch_size` rows. `dynamic`: rows of similar length, of `max_tokens` in
    all, padding included. `packed`: one row of up to `max_tokens`, which holds several sequences.
    Lengths count as rounded up to a multiple of `round_to`; rows are padded by the backend.
    """

    kind: Literal["plain", "dynamic", "packed"] = "plain"
    micro_batch_size: int = 1
    max_tokens: int = 0
    round_to: int = 1
    algorithm: str = "modified_first_fit_decreasing"

    @classmethod
    def for_training(cls, policy: PolicyConfig) -> Batching:
        """The micro-batches of passes with gradient."""
        _, tokens = policy.token_budget("train_mb_tokens")
        return cls._of(policy, policy.train_micro_batch_size, tokens)

    @classmethod
    def for_logprobs(cls, policy: PolicyConfig, micro_batch_size: int | None = None) -> Batching:
        """The micro-batches of passes without gradient; None is the policy's own size."""
        _, tokens = policy.token_budget("logprob_mb_tokens", "train_mb_tokens")
        return cls._of(policy, micro_batch_size or policy.logprob_rows, tokens)

    @classmethod
    def _of(cls, policy: PolicyConfig, size: int, max_tokens: int | None) -> Batching:
        round_to, tokens = policy.length_multiple, max_tokens or size * policy.longest_sequence
        if policy.sequence_packing.enabled:
            return cls("packed", size, tokens, round_to, policy.sequence_packing.algorithm)
        if policy.dynamic_batching.enabled:
            return cls("dynamic", size, tokens, round_to)
        return cls("plain", size, round_to=round_to)


@dataclass(frozen=True)
class PlacedShard(Shard):
    """A shard that knows where each of its sequences stands in the whole batch."""

    rows: tuple[int, ...]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def plan(
    lengths: Sequence[int], num_ranks: int, batching: Batching
) -> list[tuple[MicroBatch, ...]]:
    """The micro-batches of every rank, as indices into `lengths`; each index exactly once.

    All ranks get equally many. Empty ones are there only where a rank is left without a sequence.

    Raises:
        DataError: for a sequence that no micro-batch can hold.
    """
    rounded = [_round_up(length, batching.round_to) for length in lengths]
    _check(rounded, batching)
    match batching.kind:
        case "plain":
            groups = _even_groups(rounded, num_ranks, batching.micro_batch_size)
        case "dynamic":
            groups = _dynamic_groups(rounded, batching.max_tokens)
        case "packed":
            groups = _packed_groups(rounded, num_ranks, batching)
    groups = _fill_up(groups, num_ranks, rounded, batching.kind)
    return _deal(groups, num_ranks, rounded, batching.kind)


def shard(batch: TrainBatch, num_ranks: int, batching: Batching) -> list[PlacedShard]:
    """What each data-parallel rank gets of the batch, with the denominators of the whole."""
    shards = []
    for micro_batches in plan(batch.lengths_B.tolist(), num_ranks, batching):
        rows = tuple(i for micro_batch in micro_batches for row in micro_batch for i in row)
        local = {index: k for k, index in enumerate(rows)}
        renumbered = tuple(
            tuple(tuple(local[i] for i in row) for row in micro_batch)
            for micro_batch in micro_batches
        )
        shards.append(PlacedShard(batch.select(rows), renumbered, rows))
    return shards


def unshard(shards: Sequence[PlacedShard], values: Sequence[Tensor]) -> Tensor:
    """What the ranks computed per token, in the order of the whole batch. Shapes: [N]."""
    pieces: dict[int, Tensor] = {}
    for part, values_N in zip(shards, values, strict=True):
        lengths = part.batch.lengths_B.tolist()
        pieces |= zip(part.rows, torch.split(values_N, lengths), strict=True)
    return torch.cat([pieces[row] for row in sorted(pieces)])


def _check(rounded: Sequence[int], batching: Batching) -> None:
    if rounded and min(rounded) < 1:
        raise DataError(f"sequence {rounded.index(min(rounded))} of the batch has no tokens")
    longest = max(rounded, default=0)
    if batching.kind != "plain" and longest > batching.max_tokens:
        block = "sequence_packing" if batching.kind == "packed" else "dynamic_batching"
        raise DataError(
            f"a sequence of {longest} tokens (rounded up to a multiple of {batching.round_to}) "
            f"does not fit in a micro-batch of {batching.max_tokens}: raise "
            f"policy.{block}.train_mb_tokens (and logprob_mb_tokens), or lower "
            "policy.max_total_sequence_length"
        )


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _even_groups(lengths: Sequence[int], num_ranks: int, size: int) -> list[Group]:
    """Groups of at most `size` of similar length; equally many for all ranks if possible."""
    order = _longest_first(lengths)
    wanted = _round_up(-(-len(order) // size), num_ranks)
    num = min(wanted, len(order))
    bounds = [len(order) * k // num for k in range(num + 1)] if num else [0]
    return [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _dynamic_groups(lengths: Sequence[int], max_tokens: int) -> list[Group]:
    """Longest first, each group as many rows as the budget holds at the length of its first."""
    order = _longest_first(lengths)
    groups, start = [], 0
    while start < len(order):
        end = start + max_tokens // lengths[order[start]]
        groups.append(order[start:end])
        start = end
    return groups


def _packed_groups(lengths: Sequence[int], num_ranks: int, batching: Batching) -> list[Group]:
    """Rows by the packing algorithm; levelled if their number is no multiple of the ranks."""
    groups = ALGORITHMS[batching.algorithm](lengths, batching.max_tokens)
    num = _round_up(len(groups), num_ranks)
    if num != len(groups) and num <= len(lengths) and batching.algorithm != "concatenative":
        levelled = _level(_longest_first(lengths), num, lengths)
        if max(sum(lengths[i] for i in group) for group in levelled) <= batching.max_tokens:
            return levelled
    return groups


def _level(longest_first: Sequence[int], num: int, lengths: Sequence[int]) -> list[Group]:
    """`num` groups of about equal tokens: each sequence joins the lightest group so far.

    Source: R. L. Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17,
    416-429 (1969): longest processing time first.
    """
    groups: list[Group] = [[] for _ in range(num)]
    lightest = [(0, k) for k in range(num)]
    for index in longest_first:
        tokens, k = lightest[0]
        groups[k].append(index)
        heapq.heapreplace(lightest, (tokens + lengths[index], k))
    return groups


def _tokens(group: Group, lengths: Sequence[int], kind: str) -> int:
    """What a group costs, padding included."""
    if kind == "packed":
        return sum(lengths[i] for i in group)
    return len(group) * max((lengths[i] for i in group), default=0)


def _fill_up(groups: list[Group], num_ranks: int, lengths: Sequence[int], kind: str) -> list[Group]:
    """A multiple of the ranks: the heaviest groups are halved; the last resort is empty ones."""
    heaviest = [(-_tokens(group, lengths, kind), group) for group in groups]
    heapq.heapify(heaviest)
    done: list[Group] = []
    while heaviest and (len(heaviest) + len(done)) % num_ranks:
        _, group = heapq.heappop(heaviest)
        if len(group) == 1:
            done.append(group)
            continue
        for half in (group[: len(group) // 2], group[len(group) // 2 :]):
            heapq.heappush(heaviest, (-_tokens(half, lengths, kind), half))
    done += [group for _, group in heaviest]
    return done + [[] for _ in range(-len(done) % num_ranks)]


def _deal(
    groups: list[Group], num_ranks: int, lengths: Sequence[int], kind: str
) -> list[tuple[MicroBatch, ...]]:
    """Groups of similar weight to all ranks at a time, the heavier to who has less so far."""
    weighed = sorted(((_tokens(g, lengths, kind), g) for g in groups), key=lambda x: (-x[0], x[1]))
    totals = [0] * num_ranks
    dealt: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(weighed), num_ranks):
        ranks = sorted(range(num_ranks), key=lambda r: (totals[r], r))
        for rank, (tokens, group) in zip(ranks, weighed[start : start + num_ranks], strict=True):
            totals[rank] += tokens
            dealt[rank].append(_rows(group, kind))
    return [tuple(micro_batches) for micro_batches in dealt]


def _rows(group: Group, kind: str) -> MicroBatch:
    if not group:
        return ()
    return (tuple(group),) if kind == "packed" else tuple((i,) for i in group)
