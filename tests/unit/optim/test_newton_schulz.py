from __future__ import annotations

import pytest
import torch
from minimax import composed
from muon_by_hand import polar_by_hand

from nemo_like.config.optimizer import NEWTON_SCHULZ_STEPS, OptimizerConfig
from nemo_like.errors import ConfigError
from nemo_like.optim.build import muon_rule
from nemo_like.optim.newton_schulz import (
    SCHEDULES,
    Polynomial,
    _normalized,
    _steps,
    coefficients,
    polar,
)

PAIRS = [
    ("quintic", 5),
    ("cubic5", 5),
    *[("simple", steps) for steps in (4, 5, 6, 9)],
    *[(name, steps) for name in ("polar_express", "cans") for steps in (5, 6, 8, 12)],
    ("deepseekv4", 10),
    ("deepseekv4", 12),
    ("minimax", 4),
]
PION = tuple(coefficients("pion", 5, promotion=k) for k in range(5))
FP64 = torch.float64


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(seed))


def quintic(X: torch.Tensor, dtype: torch.dtype = FP64) -> torch.Tensor:
    return polar(X, rows=coefficients("quintic", 5), dtype=dtype)


def scalar_map(values: torch.Tensor, rows: tuple[Polynomial, ...]) -> torch.Tensor:
    for row in rows:
        values = sum(c * values ** (2 * i + 1) for i, c in enumerate(row))
    return values


@pytest.mark.parametrize(
    "rows", [*(coefficients(*pair) for pair in PAIRS), *PION, ((2.0, -1.5, 0.4, 0.1, -0.1),)]
)
def test_every_singular_value_follows_the_scalar_polynomial(rows):
    X = matrix(24, 40)
    expected = polar_by_hand(X, rows)
    found = polar(X, rows=rows, dtype=FP64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("schedule", "steps"), PAIRS)
def test_every_allowed_pair_brings_singular_values_near_one(schedule, steps):
    values = scalar_map(
        torch.linspace(0.05, 1.0, 20_001, dtype=FP64), coefficients(schedule, steps)
    )
    assert values.min() > 0.67
    assert values.max() < 1.31


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [("quintic", 4), ("quintic", 6), ("cubic5", 6), ("deepseekv4", 5), ("cans", 4)],
)
def test_a_step_count_that_a_schedule_was_not_made_for_is_refused(schedule, steps):
    with pytest.raises(ConfigError, match=f"muon_num_ns_steps={steps}.*{schedule}"):
        coefficients(schedule, steps)


def test_minimax_is_what_its_derivation_gives():
    rows = composed([5, 7, 5, 7], 0.002, margin=0.01, top=1.12)
    rounded = tuple(tuple(round(c, 4) for c in row) for row in rows)
    assert rounded == SCHEDULES["minimax"].rows


def test_minimax_treats_no_singular_value_worse_than_simple_does():
    values = torch.logspace(-5, 0, 100_001, dtype=FP64)
    ours, simple = (
        scalar_map(values, coefficients(*pair)) for pair in (("minimax", 4), ("simple", 5))
    )
    seen = values >= 0.01
    assert simple[seen].min() < 0.69 < 0.83 < ours[seen].min()
    assert ours[seen].max() < 1.1201 < 1.13 < simple[seen].max()
    assert ours[0] > simple[0]  # the slope at zero
    assert torch.all(ours >= 0.99 * simple.clamp(max=0.83))


@pytest.mark.parametrize(
    ("promotion", "edge"), [(0, 0.798), (1, 0.492), (2, 0.263), (3, 0.131), (4, 0.060)]
)
def test_pion_passes_the_strong_directions_and_stops_the_weak_ones(promotion, edge):
    values = torch.linspace(0, 1, 1001, dtype=FP64)
    passed = scalar_map(values, PION[promotion])
    assert torch.all(passed.diff() > -1e-12)
    assert passed[0] == 0
    assert passed[-1] == pytest.approx(1, abs=1e-12)
    assert (passed - 0.5).abs().argmin() == round(1000 * edge)
    assert passed[values < edge / 4].max() < 0.02


def test_pion_keeps_the_strong_direction_of_a_matrix_and_drops_the_noise():
    strong = matrix(24, 1) @ matrix(1, 40, seed=1)
    found = polar(strong + 0.05 * matrix(24, 40, seed=2), rows=PION[1], dtype=FP64)
    torch.testing.assert_close(found, strong / strong.norm(), rtol=0, atol=0.02)
    assert torch.linalg.svdvals(found)[1] < 1e-3


def test_the_keys_of_pion_and_of_custom_rows_reach_the_rule():
    pion = OptimizerConfig(muon_coefficient_type="pion", muon_promotion_steps=2)
    assert muon_rule(pion).polynomials == PION[2]
    rows = ((1.9, -1.2, 0.3), (1.5, -0.5, 0.0))
    custom = OptimizerConfig(
        muon_coefficient_type="custom", muon_ns_coefficients=rows, muon_num_ns_steps=2
    )
    assert muon_rule(custom).polynomials == rows


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
    assert torch.equal(quintic(X), one_by_one)


@pytest.mark.parametrize("shape", [(390, 400), (400, 390)])
@pytest.mark.parametrize("rows", [coefficients("minimax", 4), coefficients("cubic5", 5)])
def test_products_of_which_half_is_computed_are_whole(shape, rows):
    X = matrix(*shape)
    torch.testing.assert_close(
        polar(X, rows=rows, dtype=FP64), polar_by_hand(X, rows), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-300, 2.0**300, 2.0**1000])
def test_in_fp64_the_scale_does_not_matter_either(scale):
    X = matrix(16, 24)
    torch.testing.assert_close(quintic(X * scale), quintic(X), rtol=0, atol=0)


def test_a_matrix_of_subnormal_numbers_is_brought_up_to_size():
    X = torch.ones(8, 12) * 2.0**-149
    torch.testing.assert_close(quintic(X), quintic(torch.ones(8, 12)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_matrix_in_half_precision_is_normalised_in_single(dtype):
    X = matrix(16, 24).to(dtype)
    torch.testing.assert_close(quintic(X), quintic(X.double()), rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("rows", [coefficients("minimax", 4), coefficients("cubic5", 5), PION[2]])
@pytest.mark.parametrize("shape", [(3, 20, 30), (3, 30, 20)])
def test_a_whole_batch_at_once_as_on_a_gpu_takes_the_same_steps(shape, rows):
    X = matrix(*shape) * torch.tensor([1.0, 2.0**300, 2.0**-300], dtype=FP64)[:, None, None]
    keep = torch.tensor([True, True, False])
    torch.testing.assert_close(
        _steps(_normalized(X, keep), rows), polar(X, rows=rows, dtype=FP64, keep=keep)
    )


def test_a_row_is_divided_by_its_length():
    X = matrix(1, 50)
    close_to_one = scalar_map(torch.ones((), dtype=FP64), coefficients("quintic", 5))
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
    assert torch.equal(found[::2], polar(X[::2], rows=rows, dtype=FP64))
