"""Wilson intervals."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from skill_fairseq.probing.intervals import wilson


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (8, 10), (10, 10), (1, 1), (141, 300), (299, 300)])
def test_wilson_is_scipys(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_by_hand() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= correct <= total"):
        wilson(correct, total)
