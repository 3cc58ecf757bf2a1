import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_like.observability.metrics import flatten, reduce
from nemo_like.types import Metric

numbers = st.floats(-1e6, 1e6)
weights = st.floats(1e-3, 1e6)


def means(**kwargs):
    return st.lists(st.builds(Metric, numbers, st.just("mean"), weights), min_size=1, **kwargs)


@given(means())
def test_a_mean_is_weighted_exactly(metrics):
    total = sum(Fraction(m.weight) for m in metrics)
    expected = sum(Fraction(m.value) * Fraction(m.weight) for m in metrics) / total
    result = reduce([{"x": m} for m in metrics])["x"]
    assert result.value == pytest.approx(float(expected), rel=1e-12, abs=1e-9)
    assert result.weight == pytest.approx(float(total), rel=1e-12)


@given(
    st.sampled_from(["mean", "sum", "min", "max", "last"]),
    st.lists(st.tuples(numbers, weights), min_size=2),
    st.data(),
)
def test_reducing_in_stages_is_reducing_at_once(reduction, values, data):
    parts = [{"x": Metric(v, reduction, w)} for v, w in values]
    cut = data.draw(st.integers(1, len(parts) - 1))
    at_once = reduce(parts)["x"]
    in_stages = reduce([reduce(parts[:cut]), reduce(parts[cut:])])["x"]
    assert in_stages.value == pytest.approx(at_once.value, rel=1e-9, abs=1e-6)
    assert in_stages.weight == pytest.approx(at_once.weight, rel=1e-12)
    assert in_stages.reduction == reduction


@given(
    st.sampled_from(["mean", "sum", "min", "max"]),
    st.lists(st.tuples(numbers, weights), min_size=1),
    st.randoms(),
)
def test_the_order_of_ranks_does_not_change_a_bit(reduction, values, random):
    parts = [{"x": Metric(v, reduction, w)} for v, w in values]
    shuffled = random.sample(parts, len(parts))
    assert reduce(parts) == reduce(shuffled)


def test_each_reduction_does_what_its_name_says():
    def of(reduction):
        return reduce([{"x": Metric(v, reduction)} for v in (3.0, 1.0, 2.0)])["x"].value

    assert {r: of(r) for r in ("mean", "sum", "min", "max", "last")} == {
        "mean": 2.0,
        "sum": 6.0,
        "min": 1.0,
        "max": 3.0,
        "last": 2.0,
    }


def test_an_idle_rank_says_nothing_whatever_its_value():
    idle, busy = {"loss": Metric(math.nan, "mean", 0.0)}, {"loss": Metric(2.5, "mean", 10.0)}
    assert reduce([idle, busy]) == reduce([busy]) == {"loss": Metric(2.5, "mean", 10.0)}
    nothing = reduce([idle, idle])["loss"]
    assert math.isnan(nothing.value) and nothing.weight == 0
    assert reduce([{"loss": nothing}, busy]) == reduce([busy])


@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_nan_is_never_hidden(reduction, order):
    parts = [{"x": Metric(v, reduction)} for v in (1.0, math.nan, 2.0, 0.0)][::order]
    assert math.isnan(reduce(parts)["x"].value)


def test_infinities_of_both_signs_give_nan_not_a_crash():
    parts = [{"x": Metric(math.inf, "sum")}, {"x": Metric(-math.inf, "sum")}]
    assert math.isnan(reduce(parts)["x"].value)
    assert reduce(parts[:1])["x"].value == math.inf


def test_two_reductions_of_one_name_are_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"'loss'.*mean and sum"):
        reduce([{"loss": Metric(1.0, "sum")}, {"loss": Metric(1.0, "mean")}])


def test_a_metric_that_only_some_ranks_report_is_kept():
    assert set(reduce([{"a": Metric(1.0)}, {"b": Metric(2.0)}])) == {"a", "b"}
    assert reduce([]) == {}


def test_flatten_prefixes_names():
    assert flatten({"loss": Metric(1.0), "lr": Metric(0.1)}, "train/") == {
        "train/loss": 1.0,
        "train/lr": 0.1,
    }
