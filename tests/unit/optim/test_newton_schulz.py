from __future__ import annotations

import pytest
import torch
from muon_by_hand import polar_by_hand

from nemo_like.config.optimizer import NEWTON_SCHULZ_STEPS
from nemo_like.errors import ConfigError
from nemo_like.optim.newton_schulz import SCHEDULES, coefficients, polar

PAIRS = [
    ("quintic", 5),
    ("cubic5", 5),
    *[("simple", steps) for steps in (4, 5, 6, 9)],
    *[(name, steps) for name in ("polar_express", "cans") for steps in (5, 6, 8, 12)],
    ("deepseekv4", 10),
    ("deepseekv4", 12),
]
FP64 = torch.float64


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(seed))


def quintic(X: torch.Tensor, dtype: torch.dtype = FP64) -> torch.Tensor:
    return polar(X, rows=coefficients("quintic", 5), dtype=dtype)


def scalar_map(values: torch.Tensor, schedule: str, steps: int) -> torch.Tensor:
    for a, b, c in coefficients(schedule, steps):
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize(("schedule", "steps"), PAIRS)
def test_every_singular_value_follows_the_scalar_polynomial(schedule, steps):
    X = matrix(24, 40)
    rows = coefficients(schedule, steps)
    expected = polar_by_hand(X, rows)
    found = polar(X, rows=rows, dtype=FP64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("schedule", "steps"), PAIRS)
def test_every_allowed_pair_brings_singular_values_near_one(schedule, steps):
    values = scalar_map(torch.linspace(0.05, 1.0, 20_001, dtype=FP64), schedule, steps)
    assert values.min() > 0.67
    assert values.max() < 1.31


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [("quintic", 4), ("quintic", 6), ("cubic5", 6), ("deepseekv4", 5), ("cans", 4)],
)
def test_a_step_count_that_a_schedule_was_not_made_for_is_refused(schedule, steps):
    with pytest.raises(ConfigError, match=f"muon_num_ns_steps={steps}.*{schedule}"):
        coefficients(schedule, steps)


def test_the_table_of_step_counts_and_the_table_of_coefficients_name_the_same_schedules():
    assert NEWTON_SCHULZ_STEPS.keys() == SCHEDULES.keys() | {"pion", "custom"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("schedule", "steps"), PAIRS)
def test_low_precision_never_leaves_the_band_whatever_the_spectrum(schedule, steps, dtype):
    rows = coefficients(schedule, steps)
    steep = torch.linalg.qr(matrix(96, 96))[0] * torch.logspace(0, -3, 96, dtype=FP64)
    spectra = [torch.ones(96, 160, dtype=FP64), torch.ones(56, 64, dtype=FP64)]
    spectra += [matrix(96, 1, seed=s) @ matrix(1, 160, seed=s + 1) for s in range(3)]
    spectra += [spectra[2] + 1e-3 * matrix(96, 160), steep, matrix(96, 160)]
    for X in spectra:
        left, values, right = torch.linalg.svd(X, full_matrices=False)
        found = polar(X.float(), rows=rows, dtype=dtype).double()
        mapped = (left.T @ found @ right.T).diagonal()[values > 0.05 * values[0]]
        assert mapped.min() > 0.6
        assert mapped.max() < 1.4


@pytest.mark.parametrize("shape", [(17, 5), (5, 17), (8, 8), (1, 9), (9, 1), (1, 1)])
def test_the_transpose_gives_the_transpose(shape):
    X = matrix(*shape)
    torch.testing.assert_close(quintic(X.T), quintic(X).T, rtol=0, atol=1e-14)


def test_a_permutation_of_rows_and_columns_is_carried_over():
    X, rows, columns = matrix(12, 20), torch.randperm(12), torch.randperm(20)
    torch.testing.assert_close(
        quintic(X[rows][:, columns]), quintic(X)[rows][:, columns], rtol=0, atol=1e-13
    )


def test_a_batch_is_its_matrices_one_by_one():
    X = matrix(2, 3, 9, 6)
    one_by_one = torch.stack([torch.stack([quintic(m) for m in row]) for row in X])
    torch.testing.assert_close(quintic(X), one_by_one, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-40, 2.0**60, 2.0**120])
def test_the_scale_of_the_input_does_not_matter_from_the_smallest_to_the_largest(scale, dtype):
    X = matrix(16, 24).float().clamp(-4, 4)
    X = torch.where(X.abs() < 1, X.sign(), X)  # so that the scaled entries stay normal numbers
    torch.testing.assert_close(quintic(X * scale, dtype), quintic(X, dtype), rtol=0, atol=0)


def test_zero_gives_zero_and_does_not_disturb_its_batch():
    X = torch.stack([matrix(4, 7), torch.zeros(4, 7, dtype=FP64)])
    assert torch.equal(quintic(X)[1], torch.zeros(4, 7, dtype=FP64))
    torch.testing.assert_close(quintic(X)[0], quintic(X[0]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_does_not_become_finite(bad):
    X = matrix(4, 7)
    X[1, 2] = bad
    assert quintic(X).isnan().any()


def test_a_row_is_divided_by_its_length():
    X = matrix(1, 50)
    close_to_one = scalar_map(torch.ones((), dtype=FP64), "quintic", 5)
    torch.testing.assert_close(quintic(X), close_to_one * X / X.norm(), rtol=0, atol=1e-13)


def test_the_input_is_left_as_it_was():
    X = matrix(5, 8)
    before = X.clone()
    quintic(X)
    assert torch.equal(X, before)


def test_a_gain_multiplies_the_result():
    X, rows = matrix(2, 5, 8), coefficients("quintic", 5)
    plain = polar(X, rows=rows, dtype=FP64)
    torch.testing.assert_close(polar(X, rows=rows, dtype=FP64, gain=-0.03), -0.03 * plain)


@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 8, 5)])
def test_a_matrix_that_is_not_kept_gives_exactly_zero(shape):
    X, rows = matrix(*shape), coefficients("quintic", 5)
    found = polar(X, rows=rows, dtype=FP64, keep=torch.tensor([True, False, True]))
    assert not found[1].any()
    torch.testing.assert_close(found[::2], polar(X, rows=rows, dtype=FP64)[::2], rtol=0, atol=1e-15)
