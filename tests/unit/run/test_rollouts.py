"""Whether engine and policy agree is judged by the number that their age does not change."""

import math
from dataclasses import replace

import pytest

from nemo_like.config.generation import MismatchConfig
from nemo_like.errors import MismatchError
from nemo_like.run.rollouts import agreement_check
from nemo_like.types import Metric, StepStats

DRIFTED = StepStats({"token_mult_prob_error": Metric(1.5), "probe_mult_prob_error": Metric(1.0)})
BROKEN = StepStats({"token_mult_prob_error": Metric(1.5), "probe_mult_prob_error": Metric(1.2)})
NOT_PROBED = StepStats({"token_mult_prob_error": Metric(1.5)})


def test_what_the_policy_learned_since_is_no_disagreement_of_the_engine():
    ahead = agreement_check(MismatchConfig(), "probe_mult_prob_error", print)
    ahead(1, DRIFTED)
    ahead(2, NOT_PROBED)
    with pytest.raises(
        MismatchError, match=r"step 3: .* 1\.2000 per token \(probe_mult_prob_error"
    ):
        ahead(3, BROKEN)
    on_time = agreement_check(MismatchConfig(), "token_mult_prob_error", print)
    with pytest.raises(MismatchError, match=r"factor of 1\.5000 per token"):
        on_time(1, DRIFTED)


def test_a_step_that_was_skipped_because_nothing_in_it_is_a_number_is_no_disagreement():
    on_time = agreement_check(MismatchConfig(), "token_mult_prob_error", print)
    for value in (math.nan, math.inf):
        stats = StepStats({"token_mult_prob_error": Metric(value)}, skipped=True)
        on_time(1, stats)
        with pytest.raises(MismatchError, match="step 1"):
            on_time(1, replace(stats, skipped=False))


def test_a_disagreement_is_only_told_where_that_is_asked_for():
    said = []
    bound = MismatchConfig(action="warn", max_token_mult_prob_error=1.1)
    agreement_check(bound, "probe_mult_prob_error", said.append)(3, BROKEN)
    assert len(said) == 1 and "max_token_mult_prob_error" in said[0]
