import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_like.data.corpus import Corpus
from nemo_like.data.loader import Loader
from nemo_like.errors import CheckpointError, DataError
from nemo_like.types import Example


def corpus(name: str, num: int, *, first: int = 0) -> Corpus:
    rows = (Example((0, first + i), (False, True)) for i in range(num))
    return Corpus.of(rows, name=name)


def ids(examples: list[Example]) -> list[int]:
    return [example.token_ids[1] for example in examples]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    before=st.integers(0, 40),
    shuffle=st.booleans(),
)
def test_a_resumed_stream_goes_on_exactly_where_it_stopped(sizes, weights, before, shuffle):
    def loader():
        corpora = [corpus(f"c{i}", n, first=100 * i) for i, n in enumerate(sizes)]
        return Loader(corpora, weights=weights[: len(sizes)], seed=3, shuffle=shuffle)

    whole = loader()
    whole.take(before)
    state = json.loads(json.dumps(whole.state()))
    resumed = loader()
    resumed.load_state(state)
    assert resumed.take(25) == whole.take(25)
    assert resumed.num_taken == before + 25


def test_it_does_not_matter_in_how_many_pieces_examples_are_taken():
    one, many = (Loader([corpus("a", 7)], seed=0) for _ in range(2))
    assert one.take(20) == [e for _ in range(5) for e in many.take(4)]


def test_every_row_comes_once_in_each_epoch_in_another_order():
    loader = Loader([corpus("a", 50)], seed=0)
    epochs = [ids(loader.take(loader.epoch_size)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_without_shuffling_rows_come_in_order():
    assert ids(Loader([corpus("a", 3)], seed=0, shuffle=False).take(5)) == [0, 1, 2, 0, 1]


def test_another_seed_is_another_order():
    assert ids(Loader([corpus("a", 50)], seed=0).take(50)) != ids(
        Loader([corpus("a", 50)], seed=1).take(50)
    )


def test_each_source_has_its_share_at_all_times_to_within_one_example():
    corpora = [corpus("a", 5), corpus("b", 1000, first=1000), corpus("c", 10, first=5000)]
    loader = Loader(corpora, weights=[5, 3, 2], seed=0)
    counts: Counter[int] = Counter()
    for drawn in range(1, 200):
        counts[min(ids(loader.take(1))[0] // 1000, 2)] += 1
        for source, share in enumerate((0.5, 0.3, 0.2)):
            assert abs(counts[source] - share * drawn) <= 1


def test_a_single_row_is_enough():
    assert ids(Loader([corpus("a", 1)], seed=0).take(3)) == [0, 0, 0]


def test_an_empty_source_is_refused_by_name():
    with pytest.raises(DataError, match="nothing to draw from: b"):
        Loader([corpus("a", 1), corpus("b", 0)], seed=0)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (Loader([corpus("a", 4)], seed=0), "rows is {'a': 4}, in the checkpoint {'a': 3}"),
        (Loader([corpus("a", 3, first=1)], seed=0), "fingerprints"),
        (Loader([corpus("b", 3)], seed=0), "'b'"),
        (Loader([corpus("a", 3)], seed=1), "seed is 1, in the checkpoint 0"),
        (Loader([corpus("a", 3)], seed=0, shuffle=False), "data.shuffle is False"),
        (Loader([corpus("a", 3), corpus("b", 3)], seed=0), "shares"),
    ],
    ids=["length", "content", "name", "seed", "shuffle", "sources"],
)
def test_another_stream_is_not_resumed_and_the_difference_is_named(other, difference):
    state = Loader([corpus("a", 3)], seed=0).state()
    with pytest.raises(CheckpointError) as caught:
        other.load_state(state)
    assert difference in str(caught.value)


def test_the_state_does_not_grow():
    loader = Loader([corpus("a", 1000)], seed=0)
    before = len(json.dumps(loader.state()))
    loader.take(5000)
    assert len(json.dumps(loader.state())) <= before + 3
