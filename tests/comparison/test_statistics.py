"""Means and paired differences over seeds and recordings."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from skill_fairseq.comparison.statistics import Estimate, crossed_mean, paired_difference


def test_one_seed_is_students_interval_over_recordings() -> None:
    values = np.random.default_rng(0).normal(size=(1, 40))
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values[0]))
    assert crossed_mean(values) == pytest.approx((values.mean(), low, high))


def test_seeds_that_disagree_as_a_whole_count_as_so_many_numbers() -> None:
    """Each seed gives every recording the same value: there are three measurements, not three hundred."""
    means = [0.5, 0.6, 0.8]
    low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert crossed_mean(np.repeat(np.array(means)[:, None], 100, 1)) == pytest.approx((np.mean(means), low, high))


def test_the_variance_is_the_estimate_of_the_two_way_layout() -> None:
    """Written out with sums of squares, for a layout where nothing is bounded."""
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
    assert crossed_mean(values) == pytest.approx((grand, grand - reach, grand + reach))


@pytest.mark.parametrize("seed_spread, item_spread", [(0.0, 1.0), (0.2, 1.0), (1.0, 0.2), (0.0, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(seed_spread: float, item_spread: float) -> None:
    """Among 1,000 made-up benchmarks of three seeds: 95 %, or somewhat more, for the estimate is bounded below."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(1000):
        values = seed_spread * rng.normal(size=(3, 1)) + item_spread * rng.normal(size=(1, 60))
        found = crossed_mean(0.3 + values + rng.normal(size=(3, 60)))
        hits += found.low <= 0.3 <= found.high
    assert 930 <= hits <= 1000


def test_accuracies_of_three_seeds_hold_the_truth() -> None:
    """The same of 0 and 1, where recordings differ in how hard they are."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(500):
        easy = rng.beta(4, 1, size=(1, 300))
        found = crossed_mean(rng.random((3, 300)) < easy)
        hits += found.low <= 0.8 <= found.high
    assert 465 <= hits <= 500


def test_pairs_cancel_what_both_share() -> None:
    rng = np.random.default_rng(4)
    shared = 10 * rng.normal(size=(3, 50))
    found = paired_difference(shared + 0.5 + 0.01 * rng.normal(size=(3, 50)), shared)
    assert found.value == pytest.approx(0.5, abs=0.01) and found.high - found.low < 0.05 and found.verdict == 1
    assert paired_difference(shared, shared + 0.5) == pytest.approx((-0.5, -0.5, -0.5))
    assert paired_difference(shared, shared + 0.5).verdict == -1


def test_one_row_stands_for_every_seed() -> None:
    values, fixed = np.random.default_rng(5).random((3, 20)), np.random.default_rng(6).random(20)
    assert paired_difference(fixed, values) == crossed_mean(fixed - values)


def test_no_difference_where_the_interval_holds_zero() -> None:
    assert [Estimate(1, low, high).verdict for low, high in ((-0.1, 2), (0, 2), (0.1, 2), (-2, -0.1))] == [0, 0, 1, -1]
    assert crossed_mean(np.zeros((3, 5))) == (0, 0, 0)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((0, 3)), np.array([[1.0, np.nan]])])
def test_what_is_no_measurement_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected \(seeds, recordings\)"):
        crossed_mean(values)


def test_what_is_no_pair_is_refused() -> None:
    for shape in ((3, 4), (2, 5)):
        with pytest.raises(ValueError, match="no pairs"):
            paired_difference(np.zeros((3, 5)), np.zeros(shape))
