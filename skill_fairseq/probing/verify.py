"""Speaker verification without training: cosine scores of pairs and their equal error rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Optional, Union

import numpy as np

from skill_fairseq.probing.intervals import MIN_SPEAKERS, student_t, why_none

Trial = tuple[bool, int, int]
"""(same speaker, the indices of two recordings)."""


@dataclasses.dataclass(frozen=True)
class VerificationResult:
    """Outcome of one verification task.

    Attributes:
        eer: equal error rate, 0 to 1; lower is better, 0.5 is chance.
        interval: its 95 % interval over speakers, or None.
        scores: score of each pair.
        speakers: sorted by name; empty if there are no pseudo-values.
        by_speaker: a pseudo-value per speaker; their mean is the rate, and the differences between two models' values
            give the spread of the difference of their rates.
        no_interval: why there is no interval.
    """

    eer: float
    interval: Optional[tuple[float, float]]
    scores: list[float]
    speakers: list[str]
    by_speaker: list[float]
    no_interval: Optional[str]


def cosine_scores(features: np.ndarray, pairs: Union[np.ndarray, Sequence[tuple[int, int]]]) -> np.ndarray:
    """Cosine similarity of pairs of recordings.

    Standardises every dimension of every layer over all given recordings (without labels), then averages the layers
    with equal weights.

    Args:
        features: (N, layers, F) statistics.
        pairs: (pairs, 2) indices of two recordings each.

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
    """The rate at which false rejections and false acceptances are equally frequent.

    A pair is accepted if its score is at least the threshold. Rates are interpolated linearly between thresholds.

    Args:
        scores: (n,) higher = more alike.
        same: (n,) bool, True for pairs of one speaker.

    Returns:
        0 to 1.

    Raises:
        ValueError: one kind of pair is missing.
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


def verify(features: np.ndarray, trials: Sequence[Trial], speakers: Optional[Sequence[str]]) -> VerificationResult:
    """Scores trials and returns the equal error rate with its interval.

    Trials that share a speaker are not independent; speakers are. So the rate is recomputed without each speaker
    (delete-a-group jackknife, Shao and Wu 1989), which gives centred pseudo-values: their mean is the rate itself, and
    their variance over the number of speakers is the variance of the rate. The interval is Student's, clipped to 0 and
    1. The equal error rate is not a smooth function of the scores, so this is an approximation: in the simulations of
    tests/probing/test_verify.py the interval is rather too wide.

    Args:
        features: (N, layers, F) statistics.
        trials: pairs of recordings.
        speakers: speaker of each recording; None: unknown, which gives no interval.

    Returns:
        see `VerificationResult`.
    """
    same = np.array([trial[0] for trial in trials], dtype=bool)
    pairs = np.array([trial[1:] for trial in trials])
    scores = cosine_scores(features, pairs)
    rate = equal_error_rate(scores, same)
    result = VerificationResult(rate, None, scores.round(6).tolist(), [], [], None)
    who = np.unique([]) if speakers is None else np.asarray(speakers, dtype=str)[pairs]
    names = np.unique(who)
    number = len(names)
    if number < MIN_SPEAKERS:
        return dataclasses.replace(result, no_interval=why_none(number))
    without = []
    for name in names:
        rest = (who != name).all(1)
        if same[rest].all() or not same[rest].any():
            why = f"without speaker {name} only one kind of pair is left"
            return dataclasses.replace(result, no_interval=why)
        without.append(equal_error_rate(scores[rest], same[rest]))
    pseudo = rate + (number - 1) * (np.mean(without) - np.array(without))
    result = dataclasses.replace(result, speakers=names.tolist(), by_speaker=pseudo.tolist())
    if np.ptp(without) == 0:
        return dataclasses.replace(result, no_interval="leaving out any speaker changes nothing")
    reach = student_t(number - 1) * float(pseudo.std(ddof=1)) / math.sqrt(number)
    return dataclasses.replace(result, interval=(max(rate - reach, 0.0), min(rate + reach, 1.0)))
