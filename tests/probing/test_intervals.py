"""Intervals of rates, for independent trials and over speakers."""

from __future__ import annotations

import numpy as np
import pytest
from messages import says
from scipy.stats import binomtest

from skill_fairseq.probing.intervals import accuracy_interval, per_speaker, why_none, wilson


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (8, 10), (10, 10), (1, 1), (141, 300), (299, 300)])
def test_wilson_is_scipys(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_by_hand() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=says(correct, total, "0 <= correct <= total")):
        wilson(correct, total)


def test_a_column_a_speaker_keeps_the_mean_over_recordings() -> None:
    values = np.random.default_rng(0).random((2, 12))
    who = np.array([0, 1, 2, 2, 2, 1, 0, 2, 2, 2, 2, 2])
    found = per_speaker(values, [f"s{i}" for i in who])
    np.testing.assert_allclose(found.mean(1), values.mean(1))
    for k, count in enumerate((2, 2, 8)):
        own = values[:, who == k].mean(1)
        np.testing.assert_allclose(found[:, k], values.mean(1) + count / 4 * (own - values.mean(1)))
    balanced = per_speaker(values, [f"s{i % 3}" for i in range(12)])
    np.testing.assert_allclose(balanced, values.reshape(2, 4, 3).mean(1))


def test_not_one_speaker_a_recording_is_refused() -> None:
    with pytest.raises(ValueError, match=says("speakers: 3", "4 recordings")):
        per_speaker(np.zeros((1, 4)), ["a", "b", "c"])


def drawn(rng: np.random.Generator, speakers: int, each: int, spread: float, rate: float) -> np.ndarray:
    """(speakers, recordings) right or wrong, each speaker with its own rate."""
    own = np.full(speakers, rate)
    if spread:
        size = rate * (1 - rate) / spread**2 - 1
        own = rng.beta(rate * size, (1 - rate) * size, speakers)
    return rng.random((speakers, each)) < own[:, None]


@pytest.mark.parametrize(("speakers", "each"), [(3, 50), (6, 20), (6, 50), (20, 50)])
@pytest.mark.parametrize("spread", [0.0, 0.06, 0.12])
def test_intervals_hold_the_true_rate_as_often_as_they_say(speakers: int, each: int, spread: float) -> None:
    """95 % or somewhat more, because no interval is narrower than for independent recordings. Wilson's, which assumes
    independence, covers it in 78 to 92 % at a spread of 6 points between speakers, in 59 to 76 % at 12."""
    rng = np.random.default_rng(0)
    names = [str(k) for k in range(speakers) for _ in range(each)]
    held = naive = 0
    for _ in range(600):
        right = drawn(rng, speakers, each, spread, 0.8).ravel()
        low, high = accuracy_interval(right.tolist(), names) or (1.0, 0.0)
        held += low <= 0.8 <= high
        low, high = wilson(int(right.sum()), len(right))
        naive += low <= 0.8 <= high
    assert 0.925 <= held / 600 <= 0.99
    if spread:
        assert naive / 600 < 0.93


def test_a_speaker_who_is_always_wrong_widens_it() -> None:
    names = [str(k) for k in range(6) for _ in range(20)]
    alike = accuracy_interval(([True] * 17 + [False] * 3) * 6, names)
    apart = accuracy_interval([True] * 102 + [False] * 18, names)  # the same rate, all from the last speaker
    assert alike == pytest.approx(wilson(102, 120)) and apart is not None
    assert apart[1] - apart[0] > 3 * (alike[1] - alike[0])


def test_all_right_is_no_certainty() -> None:
    assert accuracy_interval([True] * 30, [str(k % 3) for k in range(30)]) == pytest.approx(wilson(30, 30))


def test_two_speakers_have_no_interval_and_it_is_said_why() -> None:
    assert accuracy_interval([True, False] * 150, ["theo"] * 150 + ["yweweler"] * 150) is None
    assert why_none(2).startswith("2 speakers,") and why_none(1).startswith("1 speaker,") and "unknown" in why_none(0)
