import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_like.observability.timing import StepClock, flops_per_token, peak_flops


class HandClock:
    """A time source that moves only when told."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def make_clock(**kwargs):
    hand = HandClock()
    return StepClock(total_steps=10, now=hand, **kwargs), hand


def phases(values):
    return {k.removeprefix("timing/"): v for k, v in values.items() if k.startswith("timing/")}


def test_inner_phases_take_their_time_from_the_outer_one_and_the_rest_is_other():
    clock, hand = make_clock()
    hand.time += 1
    with clock.phase("train"):
        hand.time += 2
        with clock.phase("wait"):
            hand.time += 4
        hand.time += 8
    values = clock.finish(1, num_tokens=150)
    assert phases(values) == {"other": 1, "train": 10, "wait": 4}
    assert values["performance/wall_s"] == 15
    assert values["performance/tokens_per_s"] == 10


def test_what_went_on_beside_a_step_is_no_part_of_its_wall_time():
    clock, hand = make_clock()
    hand.time += 2
    clock.beside("rollout", 1.5)
    clock.beside("rollout", 1.0)
    values = clock.finish(1, num_tokens=1)
    assert values["performance/rollout_hidden_s"] == 2.5 and phases(values) == {"other": 2}
    assert "performance/rollout_hidden_s" not in clock.finish(2, num_tokens=1)


def test_seconds_of_workers_refine_the_phase_they_happened_in():
    clock, hand = make_clock()
    with clock.phase("train"):
        hand.time += 10
    values = clock.finish(1, num_tokens=1, nested={"train": {"forward": 3, "backward": 6}})
    assert phases(values) == {"other": 0, "train": 1, "train/forward": 3, "train/backward": 6}


def test_seconds_that_do_not_fit_are_scaled_to_the_phase():
    clock, hand = make_clock()
    with clock.phase("train"):
        hand.time += 10
    values = clock.finish(1, num_tokens=1, nested={"train": {"forward": 5, "backward": 15}})
    assert phases(values) == {"other": 0, "train": 0, "train/forward": 2.5, "train/backward": 7.5}


def test_refining_a_phase_that_was_not_timed_is_an_error():
    clock, _ = make_clock()
    with pytest.raises(ValueError, match="'train' was not timed"):
        clock.finish(1, num_tokens=1, nested={"train": {"forward": 1}})


@given(
    st.lists(
        st.tuples(st.sampled_from(["data", "train", "validation"]), st.floats(0, 100)), max_size=20
    ),
    st.dictionaries(st.sampled_from(["forward", "backward"]), st.floats(0, 1000)),
)
def test_phases_add_up_to_the_wall_time_whatever_happens(spans, inner):
    clock, hand = make_clock()
    for name, seconds in spans:
        with clock.phase(name):
            hand.time += seconds
        hand.time += 0.25
    nested = {"train": inner} if any(name == "train" for name, _ in spans) else {}
    values = clock.finish(1, num_tokens=1, nested=nested)
    assert sum(phases(values).values()) == pytest.approx(values["performance/wall_s"], rel=1e-9)
    assert all(v >= -1e-9 for v in phases(values).values())


def test_the_real_clock_adds_up_within_one_percent():
    clock = StepClock(total_steps=1)
    began = time.perf_counter()
    for name in ("data", "train"):
        with clock.phase(name):
            time.sleep(0.02)
    values = clock.finish(1, num_tokens=1)
    assert sum(phases(values).values()) == pytest.approx(time.perf_counter() - began, rel=0.01)


def test_a_phase_that_raises_is_booked_and_closed():
    clock, hand = make_clock()
    with pytest.raises(KeyError), clock.phase("train"):
        hand.time += 3
        raise KeyError
    assert phases(clock.finish(1, num_tokens=1)) == {"other": 0, "train": 3}


def test_validation_and_checkpoints_do_not_slow_tokens_per_second():
    clock, hand = make_clock()
    for name, seconds in (("train", 2), ("validation", 100), ("checkpoint", 50)):
        with clock.phase(name):
            hand.time += seconds
    values = clock.finish(1, num_tokens=100)
    assert values["performance/tokens_per_s"] == 50
    assert values["performance/step_s"] == 2
    assert values["performance/wall_s"] == 152


def test_eta_counts_the_remaining_steps_at_the_mean_wall_time():
    clock, hand = make_clock()
    hand.time += 2
    assert clock.finish(1, num_tokens=1)["performance/eta_s"] == 9 * 2
    hand.time += 4
    assert clock.finish(2, num_tokens=1)["performance/eta_s"] == 8 * 3
    assert clock.finish(10, num_tokens=1)["performance/eta_s"] == 0


def test_mfu_is_reported_only_where_the_peak_is_known():
    clock, hand = make_clock(flops_per_token=6e9, peak_flops=1e12)
    hand.time += 2
    assert clock.finish(1, num_tokens=100)["performance/mfu"] == pytest.approx(0.3)
    clock, hand = make_clock(flops_per_token=6e9, peak_flops=None)
    assert "performance/mfu" not in clock.finish(1, num_tokens=100)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H200", "float32", 66.9),
        ("NVIDIA GH200 480GB", "float16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA B200", "bfloat16", 2250.0),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("NVIDIA L4", "bfloat16", 121.0),
    ],
)
def test_peaks_of_known_devices(name, dtype, tflops):
    assert peak_flops(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", ["CPU", "Intel(R) Xeon(R)", "NVIDIA A10G", "NVIDIA L40", ""])
def test_the_peak_of_an_unknown_device_is_not_guessed(name):
    assert peak_flops(name, "bfloat16") is None


def test_flops_per_token_of_a_small_transformer_by_hand():
    # 2 layers, 4 heads of 8, 100 keys seen on average of 200: scores and values are 2 matrix
    # products of 2 * 32 * 100 FLOPs each, in 2 layers, forward once and backward twice.
    attention = 3 * 2 * 2 * (2 * 32 * 100)
    expected = 3 * 2 * 1000 + attention
    found = flops_per_token(1000, num_layers=2, attention_width=32, sequence_length=200)
    assert found == expected
