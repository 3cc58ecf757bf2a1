from __future__ import annotations

import pytest
from pydantic import ValidationError

from nemo_like.config.optimizer import OptimizerConfig

CONVERGES = (1.5, -0.5, 0.0)


def optimizer(**settings: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate(settings)


def test_custom_rows_are_taken_one_for_each_step():
    rows = ((3.4445, -4.7750, 2.0315), CONVERGES, CONVERGES)
    config = optimizer(
        muon_coefficient_type="custom", muon_ns_coefficients=rows, muon_num_ns_steps=3
    )
    assert config.muon_ns_coefficients == rows


@pytest.mark.parametrize(
    ("schedule", "rows", "key"),
    [
        ("quintic", [CONVERGES] * 5, "muon_ns_coefficients"),
        ("custom", [], "muon_ns_coefficients"),
        ("custom", [CONVERGES] * 4, "muon_num_ns_steps"),
        # Each is allowed alone; five times one of them takes some singular value away.
        ("custom", [(2.2, 0.0, 0.0)] * 5, "muon_ns_coefficients"),
        ("custom", [(3.4445, -4.7750, 2.8)] * 5, "muon_ns_coefficients"),
        ("custom", [(-3.0, 0.0, 0.0)] + [(1.0, 0.0, 0.0)] * 4, "muon_ns_coefficients"),
        ("custom", [(float("nan"), 0.0, 0.0)] * 5, "muon_ns_coefficients"),
        ("custom", [(1e200, 1e200, 1e200)] * 5, "muon_ns_coefficients"),
    ],
)
def test_rows_without_their_schedule_or_number_or_that_explode_are_refused(schedule, rows, key):
    with pytest.raises(ValidationError, match=key):
        optimizer(muon_coefficient_type=schedule, muon_ns_coefficients=rows)


def test_rows_that_only_round_off_makes_explode_are_refused():
    """The published rows of `cans`: one stays in the band, and 1.0005 does not."""
    cans = [(8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630)]
    cans += [(3.2866, -2.4647, 0.5074), (2.2737, -1.6447, 0.4162)]
    with pytest.raises(ValidationError, match="singular value of 1.00"):
        optimizer(muon_coefficient_type="custom", muon_ns_coefficients=cans)


def test_promotion_steps_belong_to_pion():
    assert optimizer(muon_coefficient_type="pion", muon_promotion_steps=2).muon_promotion_steps == 2
    with pytest.raises(ValidationError, match="muon_promotion_steps"):
        optimizer(muon_promotion_steps=0)
    with pytest.raises(ValidationError, match="muon_promotion_steps"):
        optimizer(muon_coefficient_type="pion", muon_promotion_steps=5)
