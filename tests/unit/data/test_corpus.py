import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_like.data.corpus import Corpus
from nemo_like.types import Example

token = st.tuples(st.integers(0, 2**31 - 1), st.booleans())
examples = st.lists(
    st.lists(token, min_size=1, max_size=9).map(lambda row: Example(*zip(*row, strict=True))),
    max_size=9,
)


@given(examples)
def test_a_corpus_gives_back_what_it_was_made_of(rows):
    corpus = Corpus.of(rows, name="a")
    assert list(corpus) == rows
    assert corpus.lengths_B.tolist() == [len(row.token_ids) for row in rows]
    assert corpus.fingerprint == Corpus.of(rows, name="b").fingerprint


def test_a_changed_token_mask_or_border_changes_the_fingerprint():
    rows = [Example((1, 2, 3), (False, True, True)), Example((4,), (False,))]
    others = [
        [Example((1, 2, 5), (False, True, True)), rows[1]],
        [Example((1, 2, 3), (False, True, False)), rows[1]],
        [Example((1, 2), (False, True)), Example((3, 4), (True, False))],
        rows[::-1],
    ]
    found = {Corpus.of(some, name="a").fingerprint for some in [rows, *others]}
    assert len(found) == 5


def test_a_corpus_can_not_be_changed():
    corpus = Corpus.of([Example((1, 2), (False, True))], name="a")
    with pytest.raises(ValueError, match="read-only"):
        corpus.token_ids_N[0] = 9
    assert corpus.token_ids_N.dtype == np.int32


def test_a_row_that_is_not_there_is_an_index_error():
    with pytest.raises(IndexError):
        Corpus.of([], name="a")[0]
