import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_like.config.policy import PolicyConfig
from nemo_like.data.batching import Batching, plan, shard, unshard
from nemo_like.errors import DataError
from nemo_like.types import Example, TrainBatch

BATCHINGS = [
    Batching("plain", micro_batch_size=1),
    Batching("plain", micro_batch_size=4, round_to=8),
    Batching("dynamic", max_tokens=128, round_to=16),
    Batching("packed", max_tokens=128),
    Batching("packed", max_tokens=128, round_to=8, algorithm="first_fit_decreasing"),
    Batching("packed", max_tokens=128, algorithm="concatenative"),
]
batchings = pytest.mark.parametrize("batching", BATCHINGS, ids=str)
some_lengths = st.lists(st.integers(1, 128), min_size=1, max_size=80)
some_ranks = st.integers(1, 8)


def rounded(length: int, batching: Batching) -> int:
    return math.ceil(length / batching.round_to) * batching.round_to


def cost(micro_batch, lengths, batching) -> int:
    """Tokens of a forward pass, padding included."""
    rows = [sum(rounded(lengths[i], batching) for i in row) for row in micro_batch]
    return max(rows, default=0) * len(rows)


def batch_of(lengths: list[int]) -> TrainBatch:
    count = iter(range(10**6))
    return TrainBatch.of(
        [
            Example(tuple(next(count) for _ in range(n)), (False,) + (True,) * (n - 1))
            for n in lengths
        ]
    )


@batchings
@given(lengths=some_lengths, num_ranks=some_ranks)
def test_every_sequence_is_done_once_and_all_ranks_make_equally_many_passes(
    batching, lengths, num_ranks
):
    ranks = plan(lengths, num_ranks, batching)
    rows = [row for rank in ranks for micro_batch in rank for row in micro_batch]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert len(ranks) == num_ranks
    assert len({len(rank) for rank in ranks}) == 1
    if batching.kind != "packed":
        assert all(len(row) == 1 for row in rows)


@batchings
@given(lengths=some_lengths, num_ranks=some_ranks)
def test_no_micro_batch_is_over_its_limit(batching, lengths, num_ranks):
    for rank in plan(lengths, num_ranks, batching):
        for micro_batch in rank:
            if batching.kind == "plain":
                assert len(micro_batch) <= batching.micro_batch_size
            else:
                assert cost(micro_batch, lengths, batching) <= batching.max_tokens


@batchings
@given(lengths=some_lengths, num_ranks=some_ranks)
def test_a_micro_batch_is_empty_only_where_sequences_run_out(batching, lengths, num_ranks):
    ranks = plan(lengths, num_ranks, batching)
    num = sum(len(rank) for rank in ranks)
    num_empty = sum(micro_batch == () for rank in ranks for micro_batch in rank)
    assert num_empty == max(0, num - len(lengths))
    assert num_empty < num_ranks


@batchings
@given(lengths=some_lengths, num_ranks=some_ranks)
def test_the_same_lengths_give_the_same_plan(batching, lengths, num_ranks):
    assert plan(lengths, num_ranks, batching) == plan(list(lengths), num_ranks, batching)


@batchings
@given(lengths=some_lengths, num_ranks=some_ranks)
@settings(max_examples=30)
def test_unshard_undoes_shard(batching, lengths, num_ranks):
    batch = batch_of(lengths)
    shards = shard(batch, num_ranks, batching)
    values = [part.batch.token_ids_N.double() for part in shards]
    assert torch.equal(unshard(shards, values), batch.token_ids_N.double())


@batchings
def test_a_shard_holds_its_sequences_and_the_denominators_of_the_whole_batch(batching):
    batch = batch_of([5, 100, 3, 60, 60, 9, 30])
    shards = shard(batch, 2, batching)
    for part in shards:
        inside = sorted(i for micro in part.micro_batches for row in micro for i in row)
        assert inside == list(range(len(part.batch)))
        assert part.batch.num_loss_tokens == batch.num_loss_tokens
        assert part.batch.num_sequences == 7
    assert sum(int(part.batch.loss_mask_N.sum()) for part in shards) == batch.num_loss_tokens


@pytest.mark.parametrize("kind", ["plain", "dynamic", "packed"])
def test_ranks_get_about_the_same_number_of_tokens_at_every_pass(kind):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(512).log_normal_(5.0, 0.7, generator=generator)
    lengths = drawn.clamp(1, 2048).int().tolist()
    batching = Batching(kind, micro_batch_size=4, max_tokens=4096, round_to=8)
    ranks = plan(lengths, 8, batching)
    costs = [[cost(micro, lengths, batching) for micro in rank] for rank in ranks]
    slowest = sum(max(at_once) for at_once in zip(*costs, strict=True))
    mean = sum(map(sum, costs)) / len(costs)
    assert slowest / mean < 1.3


def test_packed_rows_are_levelled_when_their_number_is_no_multiple_of_the_ranks():
    lengths = [32] * 40  # ten full rows, for eight ranks
    ranks = plan(lengths, 8, Batching("packed", max_tokens=128))
    assert {sum(map(len, micro)) for rank in ranks for micro in rank} <= {2, 3}


def test_dynamic_batches_waste_less_than_plain_ones():
    lengths = [10 + 17 * i % 300 for i in range(128)]
    of = {}
    for batching in (Batching("plain", micro_batch_size=2), Batching("dynamic", max_tokens=640)):
        of[batching.kind] = len(plan(lengths, 1, batching)[0])
    assert of["dynamic"] < of["plain"]


@pytest.mark.parametrize("kind", ["dynamic", "packed"])
def test_a_sequence_that_fits_nowhere_is_refused_with_the_key_to_raise(kind):
    with pytest.raises(DataError, match=r"129 tokens.*128.*train_mb_tokens"):
        plan([5, 129], 2, Batching(kind, max_tokens=128))


def test_a_sequence_without_tokens_is_refused():
    with pytest.raises(DataError, match="no tokens"):
        plan([5, 0], 1, Batching("packed", max_tokens=128))


def test_the_config_chooses_the_kind_and_derives_the_budgets():
    plain = PolicyConfig(train_micro_batch_size=4, logprob_batch_size=8)
    assert Batching.for_training(plain) == Batching("plain", micro_batch_size=4)
    assert Batching.for_logprobs(plain).micro_batch_size == 8
    block = {"enabled": True, "logprob_mb_tokens": 9000}
    packed = PolicyConfig(train_micro_batch_size=2, sequence_packing=block)
    assert Batching.for_training(packed).max_tokens == 2 * 1024
    assert Batching.for_logprobs(packed).max_tokens == 9000
    dynamic = PolicyConfig(
        max_total_sequence_length=100,
        dynamic_batching={"enabled": True, "sequence_length_round": 48},
        make_sequence_length_divisible_by=32,
    )
    found = Batching.for_training(dynamic)
    assert (found.kind, found.round_to, found.max_tokens) == ("dynamic", 96, 192)


def test_no_rank_gets_the_heavier_micro_batches_every_time():
    lengths = [n for n in range(1, 129) for _ in range(2)]
    ranks = plan(lengths, 4, Batching("plain", micro_batch_size=4))
    totals = [sum(lengths[i] for micro in rank for row in micro for i in row) for rank in ranks]
    assert max(totals) - min(totals) <= 16


@pytest.mark.parametrize("block", [{}, {"train_mb_tokens": 2048}])
def test_validation_may_have_micro_batches_of_its_own_size(block):
    plain = PolicyConfig(train_micro_batch_size=4, logprob_batch_size=8)
    assert Batching.for_logprobs(plain, 2).micro_batch_size == 2
    packed = PolicyConfig(sequence_packing={"enabled": True, **block})
    assert Batching.for_logprobs(packed, 2).max_tokens == 2 * 1024
