"""Means and paired differences over seeds and speakers."""

from __future__ import annotations

import numpy as np
import pytest
from messages import says
from scipy import stats

from skill_fairseq.comparison.statistics import Estimate, crossed_mean, paired_difference


def own(values: np.ndarray) -> list[str]:
    """Each recording has its own speaker."""
    return [f"s{i:03}" for i in range(np.shape(values)[-1])]


def bounds(found: Estimate) -> tuple[float, float]:
    assert found.low is not None and found.high is not None
    return found.low, found.high


def test_one_seed_is_students_interval_over_speakers() -> None:
    values = np.random.default_rng(0).normal(size=(1, 40))
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values[0]))
    assert crossed_mean(values, own(values)) == pytest.approx((values.mean(), low, high))
    means = values.reshape(8, 5).mean(1)
    low, high = stats.t.interval(0.95, 7, means.mean(), stats.sem(means))
    assert crossed_mean(values, [str(i // 5) for i in range(40)]) == pytest.approx((values.mean(), low, high))


def test_seeds_that_disagree_as_a_whole_count_as_so_many_numbers() -> None:
    """Each seed gives every recording the same value, so there are three measurements, not three hundred."""
    means = [0.5, 0.6, 0.8]
    low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    values = np.repeat(np.array(means)[:, None], 100, 1)
    assert crossed_mean(values, own(values)) == pytest.approx((np.mean(means), low, high))


def test_the_variance_is_the_estimate_of_the_two_way_layout() -> None:
    """The formula written with sums of squares, for data where no bound applies."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 1)) + rng.normal(size=(1, 30)) + 0.1 * rng.normal(size=(4, 30))
    grand = values.mean()
    ms_seeds = sum(30 * (row.mean() - grand) ** 2 for row in values) / 3
    ms_items = sum(4 * (column.mean() - grand) ** 2 for column in values.T) / 29
    left = [(values[s, i] - values[s].mean() - values[:, i].mean() + grand) ** 2 for s in range(4) for i in range(30)]
    ms_left = sum(left) / (3 * 29)
    square = ms_seeds + ms_items - ms_left
    freedom = square**2 / (ms_seeds**2 / 3 + ms_items**2 / 29 + ms_left**2 / 87)
    reach = stats.t.ppf(0.975, freedom) * (square / 120) ** 0.5
    assert crossed_mean(values, own(values)) == pytest.approx((grand, grand - reach, grand + reach))


@pytest.mark.parametrize("seed_spread, speaker_spread", [(0.0, 1.0), (0.2, 1.0), (1.0, 0.2), (0.0, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(seed_spread: float, speaker_spread: float) -> None:
    """Coverage over 1,000 simulated benchmarks of three seeds: 95 %, or somewhat more."""
    rng = np.random.default_rng(2)
    names = [str(i // 3) for i in range(60)]
    hits = 0
    for _ in range(1000):
        values = seed_spread * rng.normal(size=(3, 1)) + np.repeat(speaker_spread * rng.normal(size=(1, 20)), 3, 1)
        low, high = bounds(crossed_mean(0.3 + values + rng.normal(size=(3, 60)), names))
        hits += low <= 0.3 <= high
    assert 930 <= hits <= 980


@pytest.mark.parametrize("speakers, each", [(3, 100), (6, 20), (8, 40)])
def test_accuracies_of_three_seeds_hold_the_truth_over_speakers(speakers: int, each: int) -> None:
    """Rates differ by 6 points between speakers; assuming independent recordings covers the truth less often."""
    rng = np.random.default_rng(3)
    names = [str(k) for k in range(speakers) for _ in range(each)]
    hits = naive = 0
    for _ in range(400):
        rate = rng.beta(34, 8.5, speakers)  # 0.8, standard deviation 0.06
        easy = np.clip(rng.normal(np.repeat(rate, each), 0.05), 0, 1)
        values = rng.random((3, speakers * each)) < easy
        low, high = bounds(crossed_mean(values, names))
        hits += low <= 0.8 <= high
        low, high = bounds(crossed_mean(values, own(values)))
        naive += low <= 0.8 <= high
    assert 0.93 <= hits / 400 <= 0.99 and naive < hits


def test_differences_that_vary_by_speaker_hold_the_truth() -> None:
    """One method is better for some speakers, the other for others, which pairs of recordings do not show."""
    rng = np.random.default_rng(4)
    names = [str(i // 20) for i in range(120)]
    hits = naive = 0
    for _ in range(400):
        rate, gain = rng.beta(34, 8.5, 6), 0.04 * rng.normal(size=6)
        sides = [rng.random((3, 120)) < np.repeat(np.clip(rate + sign * gain, 0, 1), 20) for sign in (1, -1)]
        low, high = bounds(paired_difference(*sides, names))
        hits += low <= 0 <= high
        low, high = bounds(paired_difference(*sides, own(sides[0])))
        naive += low <= 0 <= high
    assert 0.93 <= hits / 400 <= 0.99 and naive < hits


def test_pairs_cancel_what_both_share() -> None:
    rng = np.random.default_rng(4)
    shared = 10 * rng.normal(size=(3, 50))
    found = paired_difference(shared + 0.5 + 0.01 * rng.normal(size=(3, 50)), shared, own(shared))
    low, high = bounds(found)
    assert found.value == pytest.approx(0.5, abs=0.01) and high - low < 0.05 and found.verdict == 1
    assert paired_difference(shared, shared + 0.5 + 0.01 * rng.normal(size=(3, 50)), own(shared)).verdict == -1


def test_one_row_stands_for_every_seed() -> None:
    values, fixed = np.random.default_rng(5).random((3, 20)), np.random.default_rng(6).random(20)
    assert paired_difference(fixed, values, own(fixed)) == crossed_mean(fixed - values, own(fixed))


def test_an_interval_that_holds_zero_says_how_large_a_difference_it_allows() -> None:
    found = [Estimate(1, low, high) for low, high in ((-0.1, 2), (0, 2), (0.1, 2), (-2, -0.1), (-3, 0.5))]
    assert [estimate.verdict for estimate in found] == [0, 0, 1, -1, 0]
    assert [estimate.within for estimate in found] == [2, 2, 2, 2, 3]


@pytest.mark.parametrize("speakers", [1, 2])
def test_fewer_than_three_speakers_have_no_interval_and_no_verdict(speakers: int) -> None:
    values = np.random.default_rng(7).random((3, 20))
    found = crossed_mean(values, [str(i % speakers) for i in range(20)])
    assert found.value == pytest.approx(values.mean()) and found[1:] == (None, None)
    assert found.verdict is None and found.within is None


def test_where_nothing_varies_nothing_is_known_of_the_spread() -> None:
    shared = 10 * np.random.default_rng(4).normal(size=(3, 50))
    for difference in (paired_difference(shared, shared, own(shared)), crossed_mean(np.ones((3, 50)), own(shared))):
        assert difference.value in (0, 1) and difference.low is None and difference.high is None


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((0, 3)), np.array([[1.0, np.nan]])])
def test_what_is_no_measurement_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=says(values.shape, "(seeds, recordings)")):
        crossed_mean(values, own(values))


def test_what_is_no_pair_is_refused() -> None:
    for shape in ((3, 4), (2, 5)):
        with pytest.raises(ValueError, match=says((3, 5), shape, "not paired")):
            paired_difference(np.zeros((3, 5)), np.zeros(shape), list("abcde"))
