"""The table of what is kept."""

from __future__ import annotations

import math

import pytest

from nemo_like.checkpoint.retention import survivors

NAN = math.nan


@pytest.mark.parametrize(
    ("metrics", "k", "higher", "kept"),
    [
        ({}, 3, False, set()),
        ({1: 0.5}, 1, False, {1}),
        ({1: 0.1, 2: 0.5, 3: 0.3}, None, False, {1, 2, 3}),
        ({1: 0.1, 2: 0.5, 3: 0.3}, 1, False, {1, 3}),  # best, and the latest
        ({1: 0.1, 2: 0.5, 3: 0.3}, 1, True, {2, 3}),
        ({1: 0.1, 2: 0.5, 3: 0.3}, 2, False, {1, 3}),  # the latest is one of the best
        ({1: 0.1, 2: 0.1, 3: 0.1, 4: 9.0}, 2, False, {2, 3, 4}),  # of equals the newer
        ({1: 0.9, 2: 0.9, 3: 0.9, 4: 0.0}, 2, True, {2, 3, 4}),
        ({1: None, 2: 0.5, 3: None, 4: 0.9}, 2, False, {2, 4}),  # missing is worst
        ({1: None, 2: -0.5, 3: None, 4: None}, 1, True, {2, 4}),
        ({1: NAN, 2: 0.5, 3: NAN, 4: 0.9}, 2, True, {2, 4}),
        ({1: math.inf, 2: NAN, 3: 0.5}, 2, False, {1, 3}),  # a number, however bad, beats none
        ({1: None, 2: None, 3: None}, 2, False, {2, 3}),  # no metrics: the newest
        ({3: 0.1, 1: 0.1, 2: 0.1}, 1, False, {3}),  # order of the table is no matter
    ],
)
def test_the_latest_and_the_best_survive(metrics, k, higher, kept):
    assert survivors(metrics, keep_top_k=k, higher_is_better=higher) == kept
