"""Measures of features and scores against their formulas."""

import pytest
from scipy.stats import binomtest

from simclr_pl.metrics import wilson_interval


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("correct", "total"), [(0, 7), (3, 7), (7, 7), (880, 1000)])
def test_interval_equals_scipy_wilson(correct: int, total: int, confidence: float) -> None:
    expected = binomtest(correct, total).proportion_ci(confidence, "wilson")
    found = wilson_interval(correct, total, confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
