"""Cosine scores and equal error rate."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from messages import says

from skill_fairseq.probing.verify import (
    Trial,
    VerificationResult,
    cosine_scores,
    equal_error_rate,
    verify,
)


def brute_force_eer(scores: np.ndarray, same: np.ndarray) -> float:
    """Walk along the (false accept, false reject) polygon in tiny steps to where they are equal."""
    corners = []
    for threshold in [np.inf, *sorted(set(scores), reverse=True)]:
        corners.append(((scores[~same] >= threshold).mean(), (scores[same] < threshold).mean()))
    best = (np.inf, 0.0)
    for (accept, reject), (next_accept, next_reject) in zip(corners, corners[1:]):
        for share in np.linspace(0, 1, 2001):
            a, r = accept + share * (next_accept - accept), reject + share * (next_reject - reject)
            best = min(best, (abs(a - r), a))
    return best[1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("digits", [1, 6])
def test_eer_is_brute_force(seed: int, digits: int) -> None:
    generator = np.random.default_rng(seed)
    same = generator.random(60) < 0.3
    scores = (generator.normal(size=60) + 1.0 * same).round(digits)  # one digit: many ties
    assert equal_error_rate(scores, same) == pytest.approx(brute_force_eer(scores, same), abs=1e-3)


def test_eer_of_simple_cases() -> None:
    same = np.array([True, True, False, False])
    assert equal_error_rate(np.array([0.9, 0.8, 0.2, 0.1]), same) == 0
    assert equal_error_rate(np.array([0.1, 0.2, 0.8, 0.9]), same) == 1
    assert equal_error_rate(np.array([0.9, 0.3, 0.6, 0.1]), same) == 0.5
    assert equal_error_rate(np.zeros(4), same) == 0.5
    with pytest.raises(ValueError, match=says("4 of 4 pairs", "both")):
        equal_error_rate(np.arange(4.0), np.ones(4, dtype=bool))


def test_cosine_scores_are_the_formula() -> None:
    features = np.random.default_rng(0).normal(size=(7, 3, 5)) * np.array([1.0, 10.0, 100.0])[:, None]
    features[:, 0, 0] = 2.0  # constant: must not divide by zero
    vectors = []
    for recording in features:
        total = np.zeros(5)
        for layer in range(3):
            for d in range(5):
                column = features[:, layer, d]
                total[d] += (recording[layer, d] - column.mean()) / (column.std() or 1.0) / 3
        vectors.append(total)
    pairs = [(0, 1), (6, 2), (3, 3)]
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in ((vectors[i], vectors[j]) for i, j in pairs)]
    np.testing.assert_allclose(cosine_scores(features, pairs), expected, atol=1e-12)


def test_verify_separates_speakers_and_is_reproducible() -> None:
    generator = np.random.default_rng(1)
    speakers = np.repeat(np.arange(6), 5)
    centres = generator.normal(size=(6, 2, 20))
    trials = [(bool(speakers[i] == speakers[j]), i, j) for i in range(30) for j in range(i)]

    def result(noise: float) -> VerificationResult:
        draw = np.random.default_rng(2).normal(size=(30, 2, 20))
        return verify(centres[speakers] + noise * draw, trials, [str(s) for s in speakers])

    clear, noisy = result(0.1), result(3.0)
    assert clear.eer == 0 and len(clear.scores) == 435
    assert clear.interval is None and "changes nothing" in str(clear.no_interval)  # without variation nothing is known
    assert 0.2 < noisy.eer < 0.5 and noisy.interval and noisy.no_interval is None
    low, high = noisy.interval
    assert low < noisy.eer < high and 0.05 < high - low < 0.25
    assert result(3.0) == noisy


WHO = [str(k) for k in range(8) for _ in range(6)]


def draw(rng: np.random.Generator, spread: float = 0.0) -> tuple[np.ndarray, list[Trial]]:
    """Recordings scattered around each speaker's centre, with different spreads: all pairs of one speaker, twice as
    many of two."""
    who = np.repeat(np.arange(8), 6)
    noise = 1.2 * np.exp(spread * rng.normal(size=8))[who, None]
    vectors = rng.normal(size=(8, 12))[who] + noise * rng.normal(size=(len(who), 12))
    pairs = list(combinations(range(len(who)), 2))
    same: list[Trial] = [(True, a, b) for a, b in pairs if who[a] == who[b]]
    other: list[Trial] = [(False, a, b) for a, b in pairs if who[a] != who[b]]
    return vectors[:, None, :], same + [other[i] for i in rng.choice(len(other), 2 * len(same), replace=False)]


def test_pseudo_values_have_the_rate_as_mean_and_come_of_leaving_a_speaker_out() -> None:
    features, trials = draw(np.random.default_rng(0))
    result = verify(features, trials, WHO)
    scores = cosine_scores(features, [trial[1:] for trial in trials])
    assert result.eer == equal_error_rate(scores, np.array([trial[0] for trial in trials]))
    assert result.eer == pytest.approx(np.mean(result.by_speaker))
    without = []
    for speaker in range(8):
        rest = [i for i, (_, a, b) in enumerate(trials) if speaker not in (a // 6, b // 6)]
        without.append(equal_error_rate(scores[rest], np.array([trials[i][0] for i in rest])))
    np.testing.assert_allclose(np.diff(result.by_speaker), -7 * np.diff(without), atol=1e-12)
    np.testing.assert_allclose(result.scores, scores, atol=1e-6)
    assert result.speakers == sorted(set(WHO))


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_their_interval_holds_the_true_rate_as_often_as_it_says(spread: float) -> None:
    rng = np.random.default_rng(1)
    results = [verify(*draw(rng, spread), WHO) for _ in range(200)]
    rates = [result.eer for result in results]
    intervals = [result.interval or (1.0, 0.0) for result in results]
    held = np.mean([low <= np.mean(rates) <= high for low, high in intervals])
    assert 0.92 <= held <= 0.995
    error = np.mean([(high - rate) / 2.365 for rate, (_, high) in zip(rates, intervals)])  # t of 7 degrees of freedom
    assert np.std(rates) < error < 1.35 * np.std(rates)  # jackknives are conservative


def test_without_three_known_speakers_there_is_a_rate_but_no_interval() -> None:
    trials = [(True, 0, 1), (False, 0, 2), (True, 2, 3)]
    features = np.random.default_rng(0).normal(size=(5, 1, 3))
    two = verify(features, trials, ["a", "a", "b", "b", "c"])  # c is in no trial
    assert two.interval is None and two.by_speaker == [] and str(two.no_interval).startswith("2 speakers,")
    unknown = verify(features, trials, None)
    assert unknown.interval is None and "speakers unknown" in str(unknown.no_interval)
    assert unknown.eer == two.eer == equal_error_rate(np.array(unknown.scores), np.array([True, False, True]))


def test_pairs_of_one_kind_without_a_speaker_leave_no_interval() -> None:
    trials = [(True, 0, 1), (False, 0, 2), (False, 2, 3)]
    result = verify(np.random.default_rng(0).normal(size=(4, 1, 3)), trials, ["a", "a", "b", "c"])
    assert result.interval is None and "without speaker a" in str(result.no_interval)


def test_an_interval_ends_where_rates_do() -> None:
    """Seven distant speakers and one close to another: a few errors, for which Student's t would go below 0."""
    rng = np.random.default_rng(5)
    who = np.repeat(np.arange(8), 4)
    places = 5.0 * rng.normal(size=(8, 12))
    places[7] = places[6] + 0.05
    features = (places[who] + rng.normal(size=(32, 12)))[:, None]
    trials: list[Trial] = [(bool(who[a] == who[b]), a, b) for a, b in combinations(range(32), 2)]
    result = verify(features, trials, [str(k) for k in who])
    assert 0 < result.eer < 0.2 and result.interval and result.interval[0] == 0.0 < result.interval[1] < 1
