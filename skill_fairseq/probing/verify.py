"""Speaker verification without training: cosine scores of pairs and their equal error rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import t

Trial = tuple[bool, int, int]
"""Same speaker, and the indices of two recordings."""


@dataclasses.dataclass(frozen=True)
class VerificationResult:
    """Outcome of one verification task.

    Attributes:
        eer: equal error rate, 0 to 1; lower is better, 0.5 is chance.
        interval: 95 % interval of it, over speakers.
        trials: number of pairs.
        by_speaker: a pseudo-value a speaker; their mean is the rate, and the difference of two models' stands for the
            difference of their rates.
    """

    eer: float
    interval: tuple[float, float]
    trials: int
    by_speaker: list[float]


def cosine_scores(features: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Cosine similarity of pairs of recordings.

    Every dimension of every layer is standardised over all recordings given (no labels are used), then the
    layers are averaged with equal weights.

    Args:
        features: (N, layers, F) statistics.
        pairs: indices of two recordings each.

    Returns:
        (pairs,) in [-1, 1].
    """
    spread = features.std(0)
    standard = (features - features.mean(0)) / np.where(spread > 1e-6, spread, 1.0)
    vectors = standard.mean(1)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    first, second = np.asarray(pairs).T
    return np.einsum("nf,nf->n", vectors[first], vectors[second])


def equal_error_rate(scores: np.ndarray, same: np.ndarray) -> float:
    """Rate at which false rejections and false acceptances are equally frequent.

    A pair is accepted where its score is at least the threshold. Between two thresholds the rates are
    interpolated linearly.

    Args:
        scores: (n,) higher = more alike.
        same: (n,) bool, True for pairs of one speaker.

    Returns:
        0 to 1.

    Raises:
        ValueError: not both kinds of pairs are there.
    """
    same = np.asarray(same, dtype=bool)
    if not same.any() or same.all():
        raise ValueError(f"same: {int(same.sum())} of {same.size} pairs, expected both kinds; add trials")
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.diff(scores[order]) != 0, True)
    accepted = np.cumsum(same[order])[last_of_ties] / same.sum()
    false_accept = np.concatenate([[0.0], np.cumsum(~same[order])[last_of_ties] / (~same).sum()])
    false_reject = np.concatenate([[1.0], 1.0 - accepted])
    gap = false_accept - false_reject  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(false_accept[after - 1] + share * (false_accept[after] - false_accept[after - 1]))


def speakers_of(trials: Sequence[Trial]) -> np.ndarray:
    """Who speaks in each trial, by the trials alone: same-speaker trials join the recordings of a speaker.

    Returns:
        (trials, 2) numbers of speakers, from 0 without gaps.
    """
    pairs = np.array([trial[1:] for trial in trials])
    joined = pairs[[trial[0] for trial in trials]]
    size = int(pairs.max()) + 1
    graph = coo_array((np.ones(len(joined)), (joined[:, 0], joined[:, 1])), shape=(size, size))
    _, speakers = connected_components(graph, directed=False)
    return np.unique(speakers[pairs], return_inverse=True)[1].reshape(pairs.shape)


def verify(features: np.ndarray, trials: Sequence[Trial]) -> VerificationResult:
    """Score trials and give the equal error rate with its interval.

    Trials that share a speaker are not independent; speakers are. So the rate is computed anew without each speaker
    (delete-a-group jackknife, Shao and Wu 1989, consistent for quantiles too) and brought to centred pseudo-values,
    whose mean is the rate itself and whose variance over the number of speakers is the rate's; the interval is
    Student's, cut off at 0 and 1.

    Args:
        features: (N, layers, F) statistics.
        trials: over at least 3 speakers.

    Returns:
        see `VerificationResult`.

    Raises:
        ValueError: fewer than 3 speakers, or without one of them only one kind of trials is left.
    """
    same = np.array([trial[0] for trial in trials], dtype=bool)
    scores = cosine_scores(features, [trial[1:] for trial in trials])
    speakers = speakers_of(trials)
    number = int(speakers.max()) + 1
    if number < 3:
        raise ValueError(f"trials: {number} speakers, expected at least 3 for an interval; add trials")
    rate = equal_error_rate(scores, same)
    without = []
    for speaker in range(number):
        rest = (speakers != speaker).all(1)
        without.append(equal_error_rate(scores[rest], same[rest]))
    pseudo = rate + (number - 1) * (np.mean(without) - np.array(without))
    reach = float(t.ppf(0.975, number - 1) * pseudo.std(ddof=1) / np.sqrt(number))
    interval = max(rate - reach, 0.0), min(rate + reach, 1.0)
    return VerificationResult(rate, interval, len(trials), pseudo.tolist())
